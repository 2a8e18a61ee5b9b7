"""OPT and LLaMA models of transformers, built from shapes, never from the hub."""
