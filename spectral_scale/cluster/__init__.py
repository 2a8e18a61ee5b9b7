"""Reads launcher, scheduler and machine information before torch.distributed is initialised."""
