"""Metrics that follow from sums over examples."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from paligemma_jax.evaluation.metrics.accumulator import Accumulator, Measure, Values


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums f64[R] of each number over R samples of the examples, and how many examples have it."""

    sums: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]

    def mean(self, name: str) -> np.ndarray:
        """f64[R] over those that have the number; NaN where none does."""
        return divide(self.sums[name], self.counts[name])

    def ratio(self, over: str, under: str, empty: float = np.nan) -> np.ndarray:
        """f64[R] of one sum by another; `empty` where the second is 0."""
        return divide(self.sums[over], self.sums[under], empty)


def divide(over: np.ndarray, under: np.ndarray, empty: float = np.nan) -> np.ndarray:
    """over / under, and `empty` where that is 0."""
    return np.where(under != 0, over / np.where(under != 0, under, 1), empty)


class TotalsAccumulator(Accumulator):
    """Keeps a few named numbers of each example; an example may lack some.

    `main` names the number that says how good a prediction is.
    """

    main: str

    @abc.abstractmethod
    def _finish(self, totals: Totals) -> Values:
        """The figures f64[R]."""

    def _measure(self, rows: Sequence[Mapping[str, float]]) -> Measure:
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = np.array([[row.get(name, np.nan) for name in names] for row in rows], np.float64)
        present = (~np.isnan(table)).astype(np.float64)
        table = np.nan_to_num(table)

        def measure(weights: np.ndarray) -> Values:
            sums, counts = weights @ table, weights @ present
            return self._finish(
                Totals(
                    {name: sums[:, i] for i, name in enumerate(names)},
                    {name: counts[:, i] for i, name in enumerate(names)},
                )
            )

        return measure

    def _scores(self, rows: Sequence[Mapping[str, float]]) -> np.ndarray:
        return np.array([row[self.main] for row in rows], np.float64)


class MeanAccumulator(TotalsAccumulator):
    """The mean of each number over the examples that have it."""

    def _finish(self, totals: Totals) -> Values:
        return {name: totals.mean(name) for name in totals.sums}
