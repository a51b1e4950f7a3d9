"""Whether two implementations answer the same, without which their speeds say nothing."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.benchmark.implementation import Kind, Precision
from paligemma_jax.benchmark.task import Task

# Of the largest logit, in float32: what different orders of summation leave.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Greedy answers and logits of two implementations with the same weights and prompts.

    Attributes:
      equal: of `tokens` that were answered, those before the first difference in each row.
      difference: the largest of logits after the prompt, which reach `largest`.
      same: whether both compute the same. In float32 all tokens are equal and logits nearly. In
        another precision the logits of the first one are at most twice as far from the peer's in
        float32 as the peer's own; tokens may differ, since near ties are decided by rounding.
    """

    model: str
    dtype: Precision
    first: Kind
    second: Kind
    tokens: int
    equal: int
    difference: float
    largest: float
    same: bool

    @property
    def task(self) -> Task:
        """What was compared."""
        return Task.ANSWER

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Comparison":
        """Inverse of `to_dict`."""
        enums = {
            "dtype": Precision(values["dtype"]),
            "first": Kind(values["first"]),
            "second": Kind(values["second"]),
        }
        return cls(**{**values, **enums})

    def __str__(self) -> str:
        verdict = "the same" if self.same else "NOT the same: no speed counts"
        return (
            f"{self.model} {self.dtype}: {self.first} and {self.second} answer {verdict} "
            f"({self.equal} of {self.tokens} tokens equal, logits differ by {self.difference:.1e} "
            f"of {self.largest:.3g})"
        )


def compare(folder: Path, model: str) -> list[Comparison]:
    """Compares this library with each peer, in each precision that both have left arrays of."""
    found: dict[tuple[Kind, Precision], dict[str, np.ndarray]] = {}
    for kind, dtype in itertools.product(Kind, Precision):
        path = folder / f"{model}-{kind}-{dtype}.npz"
        if path.exists():
            with np.load(path) as arrays:
                found[kind, dtype] = dict(arrays)
    exact = found.get((Kind.HUGGING_FACE, Precision.FLOAT32))
    return [
        _compare(model, dtype, kind, found[Kind.OURS, dtype], theirs, exact)
        for (kind, dtype), theirs in found.items()
        if kind is not Kind.OURS and (Kind.OURS, dtype) in found
    ]


def _compare(
    model: str,
    dtype: Precision,
    kind: Kind,
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    exact: dict[str, np.ndarray] | None,
) -> Comparison:
    matching = np.cumprod(ours["tokens"] == theirs["tokens"], axis=1)
    largest = float(np.abs(theirs["logits"]).max())
    difference = _difference(ours, theirs)
    tokens, equal = matching.size, int(matching.sum())
    if dtype is Precision.FLOAT32 or exact is None:
        allowed = TOLERANCE * largest if dtype is Precision.FLOAT32 else np.inf
        same = equal == tokens and difference <= allowed
    else:
        same = _difference(ours, exact) <= 2 * _difference(theirs, exact)
    return Comparison(
        model=model,
        dtype=dtype,
        first=Kind.OURS,
        second=kind,
        tokens=tokens,
        equal=equal,
        difference=difference,
        largest=largest,
        same=bool(same),
    )


def _difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return float(np.abs(one["logits"] - other["logits"]).max())
