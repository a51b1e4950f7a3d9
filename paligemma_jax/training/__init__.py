"""Losses, and the training loop of the demo model."""
