"""What the launcher, the scheduler and the machines say, before torch.distributed exists."""
