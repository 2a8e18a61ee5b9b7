"""FSDP2 and HSDP (`fully_shard`), alone or with tensor parallelism."""
