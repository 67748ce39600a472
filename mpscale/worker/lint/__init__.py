"""What is wrong or slow about a workload."""
