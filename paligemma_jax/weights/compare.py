"""Two sets of weights, compared value by value."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.arrays import aligned_empty
from paligemma_jax.weights.source import Weights, piece_shapes
from paligemma_jax.weights.strict import find_problems


def require_equal(written: Weights, wanted: Weights, path: Path) -> None:
    """Raises one CheckpointError that names every tensor of `path` which is not as it was wanted.

    Bits are compared, piece by piece.
    """
    problems = find_problems(
        {name: spec.shape for name, spec in written.specs.items()},
        {name: spec.shape for name, spec in wanted.specs.items()},
    )
    problems += _config_problems(written.config, wanted.config)
    for name in wanted.specs:
        if name in written.specs and written.specs[name].shape == wanted.specs[name].shape:
            problems += _differences(written, wanted, name)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        listing = "\n  ".join(problems)
        raise CheckpointError(
            f"{path} was not written as it should be ({count}):\n  {listing}\n"
            "A disk and memory without faults fit. Nothing of it was left behind. Convert again, "
            "to another disk: paligemma convert SOURCE TARGET --verify"
        )


def _config_problems(written: PaliGemmaConfig, wanted: PaliGemmaConfig) -> list[str]:
    """Fields that differ, except those that no published format has."""
    llm = dataclasses.replace(written.llm, sliding_window=wanted.llm.sliding_window)
    written = dataclasses.replace(written, llm=llm, text_length=wanted.text_length)
    pairs = ((written.img, wanted.img), (written.llm, wanted.llm))
    return [
        f"config      {field.name}: {getattr(a, field.name)!r}, not {getattr(b, field.name)!r}"
        for a, b in pairs
        for field in dataclasses.fields(a)
        if not _alike(getattr(a, field.name), getattr(b, field.name))
    ]


def _alike(a: object, b: object) -> bool:
    """Whether two values are equal; floats may be rounded where files have them squared."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)
    return a == b


def _differences(written: Weights, wanted: Weights, name: str) -> list[str]:
    """A line if any value differs."""
    spec, found = wanted.specs[name], written.specs[name]
    if found.dtype != spec.dtype:
        return [f"dtype       {name}: {found.dtype}, not {spec.dtype}"]
    differ = 0
    fills = zip(written.pieces(name, spec.dtype), wanted.pieces(name, spec.dtype), strict=True)
    for shape, both in zip(piece_shapes(name, spec.shape), fills, strict=True):
        arrays = []
        for fill in both:
            array = aligned_empty(shape, spec.dtype)
            fill(array)
            arrays.append(array.view(f"u{array.itemsize}"))
        differ += int(np.count_nonzero(np.not_equal(*arrays)))
    return [f"values      {name}: {differ:,} of {spec.size:,} differ"] if differ else []
