"""The training step, the engines, the loop, checkpoints and monitoring."""
