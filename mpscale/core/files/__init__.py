"""Files of unknown origin are read, and files are written whole. Standard library only."""
