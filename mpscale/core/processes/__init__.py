"""Processes: started, watched, spoken with and ended. Standard library only."""
