"""FRoD: full-rank fine-tuning in a basis common to all layers (Wan et al., arXiv 2512.23485)."""
