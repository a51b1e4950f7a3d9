"""Training: configurations, losses and optimizers, the loop, checkpoints and reports."""
