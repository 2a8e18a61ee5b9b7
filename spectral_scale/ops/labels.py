"""Labels of tokens. This module needs no torch, so that data preparation can import it."""

IGNORED_LABEL = -100
"""The label of a token that no loss counts; torch's cross_entropy skips it by default."""
