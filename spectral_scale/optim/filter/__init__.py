"""The spectral-filter optimizer: gradients of parameter blocks, filtered over a graph of blocks."""
