"""Whether a checkpoint's bytes are still those that were written."""

import os
from pathlib import Path

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.arrays import aligned_empty
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.file_digests import SUMS, find_changed
from paligemma_jax.weights.source import Progress, Weights, piece_shapes


def check(path: str | os.PathLike[str], progress: Progress | None = None) -> None:
    """Reads all of a checkpoint and compares the digests it carries; raises CheckpointError.

    A store has them of every file and array, an npz of every array (CRC-32), and a Hugging Face
    directory in SHA256SUMS, which we write and the published ones do not have.
    """
    with open_checkpoint(path) as checkpoint:
        if checkpoint.kind != "huggingface":
            _read_through(checkpoint, progress)
        elif (checkpoint.path / SUMS).is_file():
            _compare(checkpoint.path)
        else:
            raise CheckpointError(
                f"{path} carries no digests to check: it has no {SUMS}. A checkpoint written by "
                f"paligemma convert does. Run: paligemma convert {path} TARGET"
            )


def _read_through(weights: Weights, progress: Progress | None) -> None:
    total = sum(spec.nbytes for spec in weights.specs.values())
    done = 0
    for name, spec in weights.specs.items():
        if progress:
            progress(name, done, total)
        shapes = piece_shapes(name, spec.shape)
        for shape, fill in zip(shapes, weights.pieces(name, spec.dtype), strict=True):
            fill(aligned_empty(shape, spec.dtype))
        done += spec.nbytes
    if progress:
        progress("", total, total)


def _compare(directory: Path) -> None:
    problems = find_changed(directory)
    if problems:
        listing = "\n  ".join(problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(
            f"{directory} is damaged ({count}):\n  {listing}\n"
            "Files exactly as they were written fit. Copy them again, or convert again: paligemma "
            "convert SOURCE TARGET --to huggingface"
        )
