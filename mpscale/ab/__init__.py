"""The same cases in two environments, in turns, each in a pytest session of its own. Imports no TensorFlow."""
