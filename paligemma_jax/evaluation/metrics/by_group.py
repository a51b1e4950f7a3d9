"""A metric for each kind of example, and means over the kinds."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.evaluation.metrics.accumulator import Accumulator, Measure, Values
from paligemma_jax.evaluation.metrics.misfit import Misfit, check_text


@dataclasses.dataclass(frozen=True)
class Grouped:
    """A reference, and the name of the kind its example is of: a split, language or type."""

    group: str
    reference: Any


class ByGroup(Accumulator):
    """Every figure f of `metric` for each group g (`f/g`), over all examples (`f`), and averaged.

    `averages` names unweighted means over groups (`f/name`): of the groups given, or of all there
    are where None is given. One whose groups are not all there is left out. References are
    `Grouped`. With `overall=False` there is no `f`: where groups cannot be compared directly, as
    CIDEr of two languages. Rules that this gives, with their metrics, are listed in `tasks`.
    """

    def __init__(
        self,
        metric: Accumulator,
        averages: Mapping[str, tuple[str, ...] | None] | None = None,
        overall: bool = True,
    ):
        super().__init__()
        if metric.ids:
            raise ConfigError(
                f"The metric holds {len(metric.ids)} examples already. An empty one fits, which "
                "serves as a pattern. Call for example: ByGroup(ExactMatch())"
            )
        self.metric = metric
        self.averages = dict(averages or {})
        self.overall = overall
        self.fits = f"A reference Grouped(group, reference) fits, of which: {metric.fits}"

    def _row(self, prediction: Any, reference: Any) -> tuple[str, Any]:
        if not isinstance(reference, Grouped):
            raise Misfit(f"the reference is of type {type(reference).__name__}, not Grouped")
        group = check_text(reference.group, "group")
        return group, self.metric._row(prediction, reference.reference)

    def _measure(self, rows: Sequence[tuple[str, Any]]) -> Measure:
        places = _places(rows)
        inner = [row for _, row in rows]
        measures = {g: self.metric._measure([inner[i] for i in p]) for g, p in places.items()}
        overall = self.metric._measure(inner) if self.overall else None

        def measure(weights: np.ndarray) -> Values:
            values = overall(weights) if overall else {}
            groups = {g: m(weights[:, places[g]]) for g, m in measures.items()}
            for group, figures in groups.items():
                values |= {f"{name}/{group}": value for name, value in figures.items()}
            for average, members in self.averages.items():
                members = tuple(groups) if members is None else members
                if all(group in groups for group in members):
                    names = [n for n in groups[members[0]] if all(n in groups[g] for g in members)]
                    for name in names:
                        every = [groups[group][name] for group in members]
                        values[f"{name}/{average}"] = np.mean(every, axis=0)
            return values

        return measure

    def _scores(self, rows: Sequence[tuple[str, Any]]) -> np.ndarray:
        scores = np.zeros(len(rows))
        for places in _places(rows).values():
            scores[places] = self.metric._scores([rows[i][1] for i in places])
        return scores

    def _counts(self) -> dict[str, float]:
        places = _places(list(self._rows.values()))
        return {f"num/{group}": float(len(members)) for group, members in places.items()}

    def _row_units(self, rows: Sequence[tuple[str, Any]]) -> list[Hashable] | None:
        return self.metric._row_units([row for _, row in rows])


def _places(rows: Sequence[tuple[str, Any]]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, (group, _) in enumerate(rows):
        places.setdefault(group, []).append(place)
    return {group: places[group] for group in sorted(places)}
