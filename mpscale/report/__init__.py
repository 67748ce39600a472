"""What a run found, for people. Nothing here imports TensorFlow or pytest."""
