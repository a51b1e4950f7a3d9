"""Whether two implementations train the same: the losses of their first steps."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from paligemma_jax.benchmark.implementation import Kind, Precision
from paligemma_jax.benchmark.record import Record
from paligemma_jax.benchmark.task import Task
from paligemma_jax.benchmark.train_case import losses_of

# Of the loss: what orders of summation leave in float32, and roundings of activations else.
TOLERANCES = {Precision.FLOAT32: 1e-4, Precision.BFLOAT16: 1e-2}


@dataclasses.dataclass(frozen=True)
class LossComparison:
    """Losses of two implementations from the same weights, adapters and batch, step by step.

    Attributes:
      ours, theirs: the losses; each later one is after one more update.
      difference: the largest, relative; infinite where their numbers of steps differ.
      same: whether it is within the tolerance.
    """

    model: str
    dtype: Precision
    task: Task
    first: Kind
    second: Kind
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def difference(self) -> float:
        """See above."""
        if not self.ours or len(self.ours) != len(self.theirs):
            return float("inf")
        ours, theirs = np.array(self.ours), np.array(self.theirs)
        return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))

    @property
    def same(self) -> bool:
        """See above; False for losses that are no numbers."""
        return self.difference <= TOLERANCES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"difference": self.difference, "same": self.same}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LossComparison":
        """Inverse of `to_dict`."""
        return cls(
            values["model"],
            Precision(values["dtype"]),
            Task(values["task"]),
            Kind(values["first"]),
            Kind(values["second"]),
            tuple(values["ours"]),
            tuple(values["theirs"]),
        )

    def __str__(self) -> str:
        verdict = "the same" if self.same else "NOT the same: no speed counts"
        ours, theirs = (" ".join(f"{x:.5f}" for x in losses) for losses in (self.ours, self.theirs))
        return (
            f"{self.model} {self.dtype}: {self.first} and {self.second} train {verdict} "
            f"({self.task}: losses {ours} and {theirs} differ by {self.difference:.1e})"
        )


def compare_losses(records: Sequence[Record], model: str) -> list[LossComparison]:
    """Compares this library with each peer, in each task and precision that both have losses of."""
    found: dict[tuple[Task, Precision, Kind], tuple[float, ...]] = {}
    for record in records:
        losses = losses_of(record.numbers)
        if record.model == model and losses:
            found.setdefault((record.task, record.dtype, record.kind), tuple(losses))
    return [
        LossComparison(model, dtype, task, Kind.OURS, kind, found[task, dtype, Kind.OURS], theirs)
        for (task, dtype, kind), theirs in found.items()
        if kind is not Kind.OURS and (task, dtype, Kind.OURS) in found
    ]
