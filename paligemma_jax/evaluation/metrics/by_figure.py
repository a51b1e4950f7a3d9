"""Figures that are each of examples of their own kind, of one set of pictures."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_jax.evaluation.metrics.accumulator import Accumulator, Measure, Values
from paligemma_jax.evaluation.metrics.by_group import Grouped
from paligemma_jax.evaluation.metrics.misfit import Misfit


@dataclasses.dataclass(frozen=True)
class OfFigure(Grouped):
    """A reference of the figure `group`, and of the figures `also`; of the picture `unit`."""

    unit: Hashable = None
    also: tuple[str, ...] = ()

    @property
    def figures(self) -> tuple[str, ...]:
        """All that the example counts in."""
        return self.group, *self.also


class ByFigure(Accumulator):
    """One number for each figure, by the metric that `metrics` gives it, over its own examples.

    Beside the metric stands which of its numbers is meant. References are `OfFigure`. Confidence
    intervals draw whole units, with all their examples.
    """

    def __init__(self, metrics: Mapping[str, tuple[Accumulator, str]]):
        super().__init__()
        self.metrics = {name: metric for name, (metric, _) in metrics.items()}
        self.names = {name: figure for name, (_, figure) in metrics.items()}
        self.fits = f"A reference OfFigure of one of {', '.join(self.metrics)} fits."

    def _row(self, prediction: Any, reference: Any) -> tuple[OfFigure, Any]:
        if not isinstance(reference, OfFigure) or not set(reference.figures) <= set(self.metrics):
            raise Misfit(f"the reference {type(reference).__name__} is of none of the figures")
        kept = self.metrics[reference.group]._row(prediction, reference.reference)
        return dataclasses.replace(reference, reference=None), kept

    def _measure(self, rows: Sequence[tuple[OfFigure, Any]]) -> Measure:
        places = self._places(rows)
        measures = {
            name: self.metrics[name]._measure([rows[i][1] for i in mine])
            for name, mine in places.items()
        }

        def measure(weights: np.ndarray) -> Values:
            return {
                name: one(weights[:, places[name]])[self.names[name]]
                for name, one in measures.items()
            }

        return measure

    def _scores(self, rows: Sequence[tuple[OfFigure, Any]]) -> np.ndarray:
        scores = np.zeros(len(rows))
        for name, metric in self.metrics.items():
            mine = [i for i, (of, _) in enumerate(rows) if of.group == name]
            if mine:
                scores[mine] = metric._scores([rows[i][1] for i in mine])
        return scores

    def _counts(self) -> dict[str, float]:
        rows = list(self._rows.values())
        return {f"num/{name}": float(len(mine)) for name, mine in self._places(rows).items()}

    def _row_units(self, rows: Sequence[tuple[OfFigure, Any]]) -> list[Hashable]:
        return [of.unit for of, _ in rows]

    def _places(self, rows: Sequence[tuple[OfFigure, Any]]) -> dict[str, list[int]]:
        places: dict[str, list[int]] = {name: [] for name in self.metrics}
        for place, (of, _) in enumerate(rows):
            for name in of.figures:
                places[name].append(place)
        return {name: mine for name, mine in places.items() if mine}
