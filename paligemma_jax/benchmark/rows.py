"""The rows of a run, as goals ask for them."""

from collections.abc import Sequence

from paligemma_jax.benchmark.implementation import Kind, Precision
from paligemma_jax.benchmark.summary import Row
from paligemma_jax.benchmark.task import TRAINING, Task


class Rows:
    """The rows of one model and task, to be asked for numbers; None for what was not measured."""

    def __init__(self, model: str, rows: Sequence[Row], task: Task = Task.ANSWER):
        self.model = model
        self._rows = [row for row in rows if row.model == model and row.task is task]

    @property
    def equal(self) -> bool:
        """False if any comparison found a difference."""
        return all(row.equal is not False for row in self._rows)

    def find(
        self, case: str, kind: Kind = Kind.OURS, dtype: Precision = Precision.FLOAT32
    ) -> Row | None:
        """The row of a case."""
        wanted = (case, kind, dtype)
        return next((r for r in self._rows if (r.case, r.kind, r.dtype) == wanted), None)

    def median(
        self, case: str, kind: Kind = Kind.OURS, dtype: Precision = Precision.FLOAT32
    ) -> float | None:
        """Seconds."""
        row = self.find(case, kind, dtype)
        return None if row is None else row.median

    def number(self, case: str, name: str) -> float | None:
        """What a case of ours found out, in whichever precision."""
        found = [r.numbers[name] for r in self._rows if r.case == case and name in r.numbers]
        return found[0] if found else None

    def best(self, case: str) -> float | None:
        """Seconds of ours in our fastest precision."""
        found = [self.median(case, dtype=dtype) for dtype in Precision]
        return min((seconds for seconds in found if seconds is not None), default=None)

    def trained(self, kind: Kind, dtype: Precision) -> Row | None:
        """The row of training steps, whatever their batch is."""
        found = (r for r in self._rows if r.task in TRAINING and r.per_second)
        return next((r for r in found if (r.kind, r.dtype) == (kind, dtype)), None)
