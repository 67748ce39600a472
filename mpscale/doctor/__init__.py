"""What can be measured on this machine, and what to change first. Imports no TensorFlow; ``train.py`` starts it."""
