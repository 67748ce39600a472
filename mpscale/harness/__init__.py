"""Runs cases, each in a process of its own, and records them."""
