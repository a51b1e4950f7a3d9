"""How far a figure might lie from that of other examples of the same kind."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.evaluation.metrics.accumulator import Accumulator

_CELLS = 4_000_000  # weights held at once


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure and the bounds of its confidence interval, in the figure's unit."""

    value: float
    low: float
    high: float


def bootstrap(
    metric: Accumulator,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: Mapping[Any, Any] | None = None,
) -> dict[str, Interval]:
    """An interval for every figure of a metric, by the percentile bootstrap.

    As many examples as there are, are drawn with replacement `resamples` times, and the figures
    made anew: the bounds are the (1 +- confidence) / 2 quantiles. Where examples belong together,
    as questions about one picture do, whole groups are drawn: `groups` gives that of each id. Of
    CIDEr the weights of n-grams stay those of all examples. Where every example scores alike the
    interval is one point: no resample can show what the examples do not.
    Source: Efron, Bootstrap Methods: Another Look at the Jackknife, 1979. The same seed gives the
    same interval. Raises ConfigError for other settings, DatasetError without examples.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ConfigError(
            f"{resamples} resamples and a confidence of {confidence} do not fit. At least 1, and "
            "more than 0 and less than 1, fit. Call for example: bootstrap(metric, resamples=1000)"
        )
    measure = metric.measure()
    units = metric.units() if groups is None else [groups[id] for id in metric.ids]
    places = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    member = np.array([places[unit] for unit in units])
    parts = [measure(w[:, member]) for w in _weights(len(places), len(units), resamples, seed)]
    plain = measure(np.ones((1, len(units))))
    tail = 50 * (1 - confidence)
    intervals = {}
    for name, value in plain.items():
        drawn = np.concatenate([part[name] for part in parts])
        drawn = drawn[~np.isnan(drawn)]  # of a group that was not drawn at all
        low, high = np.percentile(drawn, [tail, 100 - tail]) if drawn.size else (np.nan, np.nan)
        intervals[name] = Interval(float(value[0]), float(low), float(high))
    return intervals


def _weights(units: int, examples: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """f64[r, units]: how often each was drawn, a few samples at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // examples)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        # One draw a row, so that the size of a step changes nothing.
        drawn = [np.bincount(rng.integers(units, size=units), minlength=units) for _ in range(rows)]
        yield np.array(drawn, np.float64)
