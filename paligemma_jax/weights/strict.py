"""The strict comparison of a checkpoint's tensors with the model's: all problems at once."""

import difflib
import os
from collections.abc import Mapping, Sequence

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.tree import Shape


def find_problems(
    found: Mapping[str, Shape | None], expected: Mapping[str, Shape | None]
) -> list[str]:
    """One line for each missing, unexpected or misshaped tensor; a shape of None fits any."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    lines = [
        f"missing     {name}{_spell(expected[name])}{_similar(name, unexpected)}"
        for name in missing
    ]
    lines += [f"unexpected  {name}{_spell(found[name])}" for name in unexpected]
    for name, shape in expected.items():
        actual = found.get(name)
        if actual is not None and shape is not None and tuple(actual) != tuple(shape):
            lines.append(f"shape       {name}: checkpoint {actual}, model {shape}")
    return lines


def _spell(shape: Shape | None) -> str:
    return "" if shape is None else f" {shape}"


def _similar(name: str, candidates: Sequence[str]) -> str:
    # A renamed tensor is the usual cause of one missing and one unexpected; long lists are another
    # architecture, where resemblance says nothing and comparing all pairs takes long.
    if not 0 < len(candidates) <= 50:
        return ""
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
    return f" (is it {close[0]}?)" if close else ""


def require_fit(
    path: str | os.PathLike[str], found: Mapping[str, Shape], expected: Mapping[str, Shape]
) -> None:
    """Raises one CheckpointError that names every tensor which does not fit."""
    problems = find_problems(found, expected)
    if problems:
        raise misfit(path, problems)


def misfit(path: str | os.PathLike[str], problems: Sequence[str]) -> CheckpointError:
    """The error for a checkpoint whose tensors do not fit the model."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    listing = "\n  ".join(problems)
    return CheckpointError(
        f"Checkpoint {os.fspath(path)} does not fit the model ({count}):\n  {listing}\n"
        "A PaliGemma or PaliGemma 2 checkpoint with exactly the tensors of its configuration fits. "
        f"See what it holds with: paligemma info {os.fspath(path)}"
    )
