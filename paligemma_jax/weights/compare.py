"""Two sets of weights, compared value by value."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.source import Weights, families, read_pieces
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
    found = written.specs
    for family in families(wanted.specs):
        if all(n in found and found[n].shape == wanted.specs[n].shape for n in family):
            problems += _differences(written, wanted, family)
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


def _differences(written: Weights, wanted: Weights, family: Sequence[str]) -> list[str]:
    """A line for each tensor of which any value differs; see `families`."""
    problems = []
    for name in family:
        spec, found = wanted.specs[name], written.specs[name]
        if found.dtype != spec.dtype:
            problems.append(f"dtype       {name}: {found.dtype}, not {spec.dtype}")
    if problems:
        return problems
    differ = [0] * len(family)
    for pairs in zip(read_pieces(written, family), read_pieces(wanted, family), strict=True):
        for number, both in enumerate(zip(*pairs, strict=True)):
            bits = [array.view(f"u{array.itemsize}") for array in both]
            differ[number] += int(np.count_nonzero(np.not_equal(*bits)))
    return [
        f"values      {name}: {count:,} of {wanted.specs[name].size:,} differ"
        for name, count in zip(family, differ, strict=True)
        if count
    ]
