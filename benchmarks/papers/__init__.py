"""The published tables of the papers, one command each."""
