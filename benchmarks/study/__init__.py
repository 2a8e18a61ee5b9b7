"""The study: every method on the same books, with the same budget (`run.py` is the command)."""
