"""The process of one case. The only part besides scaling and workloads that uses TensorFlow."""
