"""Where the embedded demo checkpoint lies."""

from pathlib import Path

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.store import is_store

PACKAGE = Path(__file__).resolve().parents[1]


def demo_checkpoint(package: Path = PACKAGE) -> Path:
    """Directory of the demo checkpoint, given that of the package; raises CheckpointError."""
    # A wheel carries checkpoints/ inside the package; a checkout and an editable install have it
    # beside the package, as it stands in the repository.
    places = [parent / "checkpoints" / "demo" for parent in (package, package.parent)]
    for place in places:
        if is_store(place):
            return place
    raise CheckpointError(
        f"The demo checkpoint is neither in {places[0]} nor in {places[1]}. Every wheel and every "
        "whole checkout has it. Install again: pip install --force-reinstall paligemma-jax"
    )
