"""Computes the memory and traffic of a run before it starts. Nothing is measured."""
