"""The bundled demo model, and the synthetic world of shapes and words that it is trained on."""

from pathlib import Path

from paligemma_jax.errors import CheckpointError

_PACKAGE = Path(__file__).resolve().parents[1]


def demo_checkpoint(package: Path = _PACKAGE) -> Path:
    """Directory of the demo checkpoint, given that of the package; raises CheckpointError."""
    # A wheel carries checkpoints/ inside the package; a checkout and an editable install have it
    # beside the package, as in the repository.
    places = [parent / "checkpoints" / "demo" for parent in (package, package.parent)]
    for place in places:
        if (place / "params").is_dir():
            return place
    raise CheckpointError(
        f"expected the demo checkpoint in {places[0]} or {places[1]}, found neither. "
        "Install again: pip install --force-reinstall paligemma-jax"
    )
