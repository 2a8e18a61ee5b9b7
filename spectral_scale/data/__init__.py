"""Text to token folders (`prepare`), and token folders to batches (`tokens`, `order`, `loader`).

The modules are imported by name so that preparing data does not load torch.
"""
