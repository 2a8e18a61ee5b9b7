"""Backends of the training step: one folder each, which alone imports the backend's package."""
