"""Where the embedded demo checkpoint lies."""

from pathlib import Path


def demo_checkpoint() -> Path:
    """Path of the embedded demo checkpoint."""
    return Path(__file__).parents[2] / "checkpoints" / "demo"
