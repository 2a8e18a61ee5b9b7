"""Turns a run into files: exported weights, adapters, pruned models, perplexities."""
