"""Many cases, each in a process of its own. Only worker.py and execute.py, which run in it, use TensorFlow."""
