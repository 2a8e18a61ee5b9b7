"""What a training step costs, measured: time by part and bytes of persistent state."""
