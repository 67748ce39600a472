"""Runs the same cases in two environments, by two pytest sessions that take turns. Imports no TensorFlow."""
