"""Hosts of the training step: one file each, each importing its host package alone."""
