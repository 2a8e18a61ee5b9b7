"""The methods Sparse Spectral Training is compared with, under the same harness and settings."""
