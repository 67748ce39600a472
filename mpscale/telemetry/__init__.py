"""The host and the GPU while a case runs. Nothing here imports TensorFlow."""
