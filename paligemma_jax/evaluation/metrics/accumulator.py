"""What every metric is: examples added one by one, merged across processes, scored at the end."""

import abc
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from paligemma_jax.evaluation.metrics.misfit import Misfit, refuse
from paligemma_jax.evaluation.metrics.pairing import Examples, Id, pair, sort_key

Values = dict[str, np.ndarray]
# Weights f64[R, n] say how often each of n examples counts in each of R samples; the answer is
# every figure of the metric as f64[R]. The plain result is one sample of ones; a bootstrap many.
Measure = Callable[[np.ndarray], Values]


class Accumulator(abc.ABC):
    """Examples of one metric, kept by id.

    What is kept of an example is little and plain, so an accumulator can be pickled and sent from
    one process to another; order and grouping of examples never change a result. Settings are
    public attributes, and are fixed.
    """

    fits: str = ""  # what `add` takes, in one sentence

    def __init__(self) -> None:
        self._rows: dict[Id, Any] = {}
        self._left_out: dict[Id, str] = {}

    def add(self, id: Id, prediction: Any, reference: Any) -> None:
        """Adds one example; raises DatasetError if it does not fit, or if the id is there."""
        self._add_all([(id, prediction, reference)])

    def add_all(
        self, predictions: Examples[Any], references: Examples[Any]
    ) -> Self:  # fmt: skip
        """Adds many and returns itself; two mappings from ids, or two lists in one order.

        Raises DatasetError that lists all that does not fit; then none is added.
        """
        self._add_all(pair(predictions, references))
        return self

    def leave_out(self, id: Id, reason: str) -> None:
        """Notes an example that could not be predicted; it counts in `left_out` alone."""
        if id in self._rows or id in self._left_out:
            raise _twice([id])
        self._left_out[id] = reason

    def merge(self, other: Self) -> None:
        """Adds what another process has; raises DatasetError for another metric or a common id."""
        if self.settings() != other.settings():
            raise refuse(
                [f"{other.settings()} cannot be added to {self.settings()}"],
                "The same metric with the same settings fits.",
                "Make both in the same way.",
            )
        mine = self._rows.keys() | self._left_out.keys()
        common = mine & (other._rows.keys() | other._left_out.keys())
        if common:
            raise _twice(sorted(common, key=sort_key))
        self._rows |= other._rows
        self._left_out |= other._left_out

    def result(self) -> dict[str, float]:
        """Every figure by name, with `num` examples counted and `left_out` not.

        Raises DatasetError if there are no examples.
        """
        values = self.measure()(np.ones((1, len(self._rows))))
        counts = {"num": float(len(self._rows)), "left_out": float(len(self._left_out))}
        return {name: float(v[0]) for name, v in values.items()} | counts | self._counts()

    def measure(self) -> Measure:
        """The figures as a function of weights f64[R, n] of the examples, in the order of `ids`."""
        if not self._rows:
            raise refuse(
                [f"{type(self).__name__} has no examples ({len(self._left_out)} were left out)"],
                "At least one fits.",
                "Add some: metric.add(id, prediction, reference)",
            )
        return self._measure([self._rows[id] for id in self.ids])

    @property
    def ids(self) -> list[Id]:
        """Of all examples that count, numbers first, sorted."""
        return sorted(self._rows, key=sort_key)

    @property
    def left_out(self) -> dict[Id, str]:
        """Why examples do not count, by id."""
        return dict(self._left_out)

    @property
    def scores(self) -> dict[Id, float]:
        """How good each prediction is, higher is better: to find the best and the worst."""
        ids = self.ids
        if not ids:
            return {}
        values = self._scores([self._rows[id] for id in ids])
        return {id: float(value) for id, value in zip(ids, values, strict=True)}

    def units(self) -> list[Hashable]:
        """What each example belongs to, in the order of `ids`: a bootstrap draws whole units."""
        ids = self.ids
        return self._row_units([self._rows[id] for id in ids]) or list(ids)

    def settings(self) -> tuple[Any, ...]:
        """Name and settings of the metric, to compare."""
        own = [(k, v) for k, v in vars(self).items() if not k.startswith("_")]
        return type(self).__name__, *[(k, _plain(v)) for k, v in own]

    @abc.abstractmethod
    def _row(self, prediction: Any, reference: Any) -> Any:
        """What is kept of one example; raises Misfit."""

    @abc.abstractmethod
    def _measure(self, rows: Sequence[Any]) -> Measure:
        """See `measure`."""

    @abc.abstractmethod
    def _scores(self, rows: Sequence[Any]) -> np.ndarray:
        """f64[n]; see `scores`."""

    def _row_units(self, rows: Sequence[Any]) -> list[Hashable] | None:
        """See `units`; None where each example is one of its own."""
        return None

    def _counts(self) -> dict[str, float]:
        """More figures that are plain counts of what there is."""
        return {}

    def _add_all(self, examples: Sequence[tuple[Id, Any, Any]]) -> None:
        rows: dict[Id, Any] = {}
        problems = []
        for id, prediction, reference in examples:
            if id in self._rows or id in self._left_out:
                problems.append(f"{id!r} has been added before")
            try:
                rows[id] = self._row(prediction, reference)
            except Misfit as e:
                problems.append(f"{id!r}: {e}")
        if problems:
            mend = "Mend these records, or note each: metric.leave_out(id, reason)"
            raise refuse(problems, self.fits, mend)
        self._rows |= rows


def _twice(ids: Sequence[Id]) -> Exception:
    return refuse(
        [f"{id!r} has been added before" for id in ids],
        "Every id once fits.",
        "Give every process examples of its own.",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Accumulator):
        return value.settings()
    if isinstance(value, Mapping):
        return tuple((k, _plain(v)) for k, v in value.items())
    return value
