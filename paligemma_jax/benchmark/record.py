"""What one process has found out about one case: a line of JSON on its way to the others."""

import dataclasses
from typing import Any

from paligemma_jax.benchmark.implementation import Kind, Precision
from paligemma_jax.benchmark.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One case in one process.

    Attributes:
      seconds: the samples.
      others: for each, the share of all CPUs that other processes used meanwhile.
      rows: pictures or tokens that one sample yields; 0 where that says nothing.
      flops, bytes: for each part of the work, what it must do and move at least.
      compilations: programs that JAX made for it; None for a peer.
      peak_bytes: most memory that the process held so far.
      numbers: what else was found out.
      error: why it could not be measured.
      task: what the process did with the model.
    """

    model: str
    kind: Kind
    dtype: Precision
    repeat: int
    case: str
    seconds: tuple[float, ...] = ()
    others: tuple[float, ...] = ()
    rows: int = 0
    flops: tuple[float, ...] = ()
    bytes: tuple[float, ...] = ()
    compilations: int | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    error: str | None = None
    task: Task = Task.ANSWER

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Record":
        """Inverse of `to_dict`."""
        lists = {k: tuple(values[k]) for k in ("seconds", "others", "flops", "bytes")}
        kinds = {
            "kind": Kind(values["kind"]),
            "dtype": Precision(values["dtype"]),
            "task": Task(values.get("task", Task.ANSWER)),  # files of before have none
        }
        return cls(**{**values, **lists, **kinds})
