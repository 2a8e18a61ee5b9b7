"""Computes the memory, traffic and time of a run before it starts. Nothing is measured."""
