"""LoRA and ReLoRA*."""
