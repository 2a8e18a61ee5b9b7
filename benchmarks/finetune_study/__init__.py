"""The fine-tuning study: four methods, with and without the filter (`run.py` is the command)."""
