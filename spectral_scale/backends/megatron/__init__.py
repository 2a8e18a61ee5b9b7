"""megatron-core: tensor parallelism in groups of neighbouring ranks, data parallelism across."""
