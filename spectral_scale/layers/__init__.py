"""Layers of the methods, and their conversion from and back to dense linears."""
