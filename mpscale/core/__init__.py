"""What more than one process needs: the nouns. Standard library only."""
