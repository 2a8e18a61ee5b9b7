"""One process, or DistributedDataParallel."""
