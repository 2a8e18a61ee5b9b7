"""Pure tensor mathematics. Knows nothing of processes, layers or configuration."""
