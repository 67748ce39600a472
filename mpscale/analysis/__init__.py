"""Numbers from the records of a run. Nothing here imports TensorFlow or pytest."""
