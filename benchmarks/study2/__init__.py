"""The second study: blocks hold the parameters, three axes (`run.py` is the command)."""
