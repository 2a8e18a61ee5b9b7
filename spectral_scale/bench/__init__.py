"""Measures the cost of a training step: time by phase and bytes of persistent state."""
