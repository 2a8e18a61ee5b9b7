"""Examines the machines of a job before a run depends on them."""
