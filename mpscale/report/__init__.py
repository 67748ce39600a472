"""Reports of runs, comparisons and histories. Nothing here imports TensorFlow or pytest."""
