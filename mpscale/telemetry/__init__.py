"""What the machine did while a case ran. Nothing here imports TensorFlow."""
