"""Several metrics at once."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from paligemma_jax.evaluation.metrics.accumulator import Accumulator, Measure, Values


class Together(Accumulator):
    """Several metrics of the same predictions and references, under their own names.

    The first one says how good each prediction is.
    """

    def __init__(self, *metrics: Accumulator):
        super().__init__()
        self.metrics = tuple(metrics)
        self.fits = metrics[0].fits

    def settings(self) -> tuple[Any, ...]:
        return "Together", *[metric.settings() for metric in self.metrics]

    def _row(self, prediction: Any, reference: Any) -> tuple[Any, ...]:
        return tuple(metric._row(prediction, reference) for metric in self.metrics)

    def _measure(self, rows: Sequence[tuple[Any, ...]]) -> Measure:
        columns = list(zip(*rows, strict=True))
        measures = [m._measure(c) for m, c in zip(self.metrics, columns, strict=True)]

        def measure(weights: np.ndarray) -> Values:
            values: Values = {}
            for one in measures:
                values |= one(weights)
            return values

        return measure

    def _scores(self, rows: Sequence[tuple[Any, ...]]) -> np.ndarray:
        return self.metrics[0]._scores([row[0] for row in rows])

    def _row_units(self, rows: Sequence[tuple[Any, ...]]) -> list[Hashable] | None:
        return self.metrics[0]._row_units([row[0] for row in rows])
