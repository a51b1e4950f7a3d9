"""All that one run has found out."""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

from paligemma_jax.benchmark.equality import Comparison
from paligemma_jax.benchmark.goals import Judged, judge
from paligemma_jax.benchmark.record import Record
from paligemma_jax.benchmark.summary import Row, summarize
from paligemma_jax.benchmark.train_equality import LossComparison

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """A run: what every process has said, and what follows from it.

    `str` of it is the table for a terminal, `to_markdown()` the one for a file.
    """

    size: str
    on_cpu: bool
    environment: dict[str, str]
    records: tuple[Record, ...]
    comparisons: tuple[Comparison | LossComparison, ...]
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def rows(self) -> list[Row]:
        """One for each case, implementation and precision of each model."""
        return summarize(self.records, self.comparisons, on_cpu=self.on_cpu)

    @functools.cached_property
    def goals(self) -> list[Judged]:
        """Every goal with its verdict."""
        return judge(self.rows, on_cpu=self.on_cpu)

    def __str__(self) -> str:
        from paligemma_jax.benchmark.report import as_text

        return as_text(self)

    def to_markdown(self) -> str:
        """The same as tables of Markdown."""
        from paligemma_jax.benchmark.report import as_markdown

        return as_markdown(self)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what was measured, and rows and goals that follow from it."""
        return {
            "format": FORMAT,
            "size": self.size,
            "on_cpu": self.on_cpu,
            "environment": self.environment,
            "notes": list(self.notes),
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "rows": [row.to_dict() for row in self.rows],
            "goals": [goal.to_dict() for goal in self.goals],
            "records": [record.to_dict() for record in self.records],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BenchmarkResult":
        """Inverse of `to_dict`; rows and goals are worked out again."""
        return cls(
            values["size"],
            values["on_cpu"],
            values["environment"],
            tuple(Record.from_dict(record) for record in values["records"]),
            tuple(_comparison(comparison) for comparison in values["comparisons"]),
            tuple(values["notes"]),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; a file of that name is replaced when the new one is complete."""
        target = Path(path)
        unfinished = target.with_name(target.name + ".part")
        unfinished.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        unfinished.replace(target)


def _comparison(values: dict[str, Any]) -> Comparison | LossComparison:
    return (LossComparison if "theirs" in values else Comparison).from_dict(values)
