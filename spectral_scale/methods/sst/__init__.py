"""Sparse Spectral Training (Zhao et al., arXiv 2405.15481)."""
