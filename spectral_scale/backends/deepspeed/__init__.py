"""DeepSpeed ZeRO-0 to 3, with and without optimizer state on the CPU."""
