"""What every metric is: examples added one by one, merged across processes, scored at the end.

What of an example does not fit a metric, said for all examples at once.

Which prediction belongs to which reference.

Metrics that follow from sums over examples.

A metric for each kind of example, and means over the kinds.

Figures that are each of examples of their own kind, of one set of pictures.

Several metrics at once.

How far a figure might lie from that of other examples of the same kind.
"""

import abc
import dataclasses
import numbers
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Self, TypeVar

import numpy as np

from paligemma_jax.errors import ConfigError, DatasetError

_SHOWN = 100  # problems in a message; the rest are counted


class Misfit(Exception):
    """One example does not fit; the text says why, without its id and without advice."""


def refuse(problems: Sequence[str], fits: str, mend: str) -> DatasetError:
    """The error that lists `problems`; `fits` and `mend` are its last two sentences."""
    count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return DatasetError(f"The data does not fit ({count}):{shown}{more}\n{fits} {mend}")


def check_text(value: Any, what: str) -> str:
    """`value` itself; raises Misfit unless it is a string."""
    if value is None:
        raise Misfit(f"the {what} is missing")
    if not isinstance(value, str):
        raise Misfit(f"the {what} is {_show(value)} of type {type(value).__name__}, no string")
    return value


def check_texts(values: Any, what: str, count: int | None = None) -> list[str]:
    """`values` as a list; raises Misfit unless it holds strings: `count` of them, or at least one.

    A single string is no list: its letters would be taken for answers.
    """
    if values is None:
        raise Misfit(f"the {what}s are missing")
    if isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__iter__"):
        raise Misfit(f"the {what}s are {_show(values)} of type {type(values).__name__}, no list")
    values = list(values)
    if not values:
        raise Misfit(f"there are no {what}s")
    if count is not None and len(values) != count:
        raise Misfit(f"there are {len(values)} {what}s, not {count}")
    wrong = [value for value in values if not isinstance(value, str)]
    if wrong:
        kinds = ", ".join(sorted({type(value).__name__ for value in wrong}))
        raise Misfit(f"{len(wrong)} of the {what}s are no strings but {kinds}: {_show(wrong[0])}")
    return values


def check_number(value: Any, what: str, low: float = float("-inf")) -> float:
    """`value` as a float; raises Misfit unless it is a finite number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Misfit(f"the {what} is {_show(value)} of type {type(value).__name__}, no number")
    number = float(value)
    if not low <= number < float("inf"):
        raise Misfit(f"the {what} is {number}, no number" + (f" from {low:g} up" * (low > -1e308)))
    return number


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


Id = str | int
T = TypeVar("T")
P = TypeVar("P")
R = TypeVar("R")
# Paired by id or by place. A mapping's keys are `Id`; a type checker would refuse dict[str, T] for
# Mapping[str | int, T].
Examples = Mapping[Any, T] | Sequence[T]


def by_id(pairs: Iterable[tuple[Id, T]]) -> dict[Id, T]:
    """The values by id; raises DatasetError naming every id that comes twice."""
    values: dict[Id, T] = {}
    counts: dict[Id, int] = {}
    for id, value in pairs:
        counts[id] = counts.get(id, 0) + 1
        values[id] = value
    problems = [f"{id!r} comes {count} times" for id, count in counts.items() if count > 1]
    if problems:
        raise refuse(problems, "Every id once fits.", "Leave out all but one record of each.")
    return values


def pair(predictions: Examples[P], references: Examples[R]) -> list[tuple[Id, P, R]]:
    """(id, prediction, reference) of every example, in the order of the references.

    Two mappings are paired by id, two sequences of one length by place, which is then the id.
    Raises DatasetError naming every id without partner.
    """
    if isinstance(predictions, Mapping) and isinstance(references, Mapping):
        alone = [id for id in references if id not in predictions]
        problems = [f"{id!r} has a reference, but no prediction" for id in alone]
        alone = [id for id in predictions if id not in references]
        problems += [f"{id!r} has a prediction, but no reference" for id in alone]
        if problems:
            raise refuse(
                problems,
                "The same ids on both sides fit.",
                "Predict what is missing, or score a part: "
                "{id: references[id] for id in predictions}",
            )
        return [(id, predictions[id], reference) for id, reference in references.items()]
    if isinstance(predictions, str | Mapping) or isinstance(references, str | Mapping):
        raise refuse(
            [
                f"predictions are of type {type(predictions).__name__} and references of type "
                f"{type(references).__name__}"
            ],
            "Two lists in one order, or two mappings from ids, fit.",
            "Call for example: exact_match(['a cat'], ['a cat'])",
        )
    if len(predictions) != len(references):
        raise refuse(
            [f"there are {len(predictions)} predictions and {len(references)} references"],
            "Two lists of one length and order fit.",
            "To pair by id, pass two mappings: {id: prediction}, {id: reference}",
        )
    return [(i, p, r) for i, (p, r) in enumerate(zip(predictions, references, strict=True))]


def sort_key(id: Id) -> tuple[bool, Any]:
    """Numbers by size and before strings, so that results do not depend on who came first."""
    return isinstance(id, str), id


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
