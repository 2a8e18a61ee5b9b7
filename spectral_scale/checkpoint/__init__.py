"""Checkpoints: safetensors and JSON, written to a temporary name and committed by one rename."""
