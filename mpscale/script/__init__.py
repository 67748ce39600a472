"""Comparing precisions from a script or a notebook."""
