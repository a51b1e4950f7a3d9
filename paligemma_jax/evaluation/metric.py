"""The base of every metric: examples are added one by one, merged across processes and scored at
the end, all together and per group, with confidence intervals by the bootstrap.
"""

import abc
import dataclasses
import inspect
import numbers
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from paligemma_jax.errors import ConfigError, DatasetError, problem_list

_CELLS = 4_000_000  # bootstrap weights held at once

Id = str | int
T = TypeVar("T")
# Paired by id or by position. A mapping's keys are `Id`; a type checker would refuse dict[str, T]
# for Mapping[str | int, T].
Examples = Mapping[Any, T] | Sequence[T]
Values = dict[str, np.ndarray]
# Weights f64[R, n] say how often each of n examples counts in each of R samples; the result is
# every score as f64[R]. The plain result is one sample of ones, a bootstrap many samples.
Measure = Callable[[np.ndarray], Values]


class InvalidExample(DatasetError):
    """One example cannot be scored; the text says why, without its id."""


def data_error(problems: Sequence[str], expected: str, fix: str) -> DatasetError:
    """The error that lists `problems`; `expected` and `fix` are its last two sentences."""
    return DatasetError(f"The data is invalid {problem_list(problems)}\n{expected} {fix}")


def check_text(value: Any, what: str) -> str:
    """`value` itself; raises InvalidExample unless it is a string."""
    if value is None:
        raise InvalidExample(f"the {what} is missing")
    if not isinstance(value, str):
        raise InvalidExample(f"expected the {what} to be a string, got {_shown(value)}")
    return value


def check_texts(values: Any, what: str, count: int | None = None) -> list[str]:
    """`values` as a list; raises InvalidExample unless it holds `count` (at least one) strings.

    A single string is not a list: its letters would be taken for answers.
    """
    if values is None:
        raise InvalidExample(f"the {what}s are missing")
    if isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__iter__"):
        raise InvalidExample(f"expected a list of {what}s, got {_shown(values)}")
    values = list(values)
    if not values:
        raise InvalidExample(f"there are no {what}s")
    if count is not None and len(values) != count:
        raise InvalidExample(f"expected {count} {what}s, got {len(values)}")
    wrong = [value for value in values if not isinstance(value, str)]
    if wrong:
        raise InvalidExample(f"expected every {what} to be a string, got {_shown(wrong[0])}")
    return values


def check_number(value: Any, what: str, low: float = float("-inf")) -> float:
    """`value` as a float; raises InvalidExample unless it is finite and at least `low`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidExample(f"expected the {what} to be a number, got {_shown(value)}")
    number = float(value)
    if not low <= number < float("inf"):
        bound = f" of at least {low:g}" if low > float("-inf") else ""
        raise InvalidExample(f"expected the {what} to be a number{bound}, got {number}")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def divide(over: np.ndarray, under: np.ndarray, empty: float = np.nan) -> np.ndarray:
    """over / under, and `empty` where that is 0."""
    return np.where(under != 0, over / np.where(under != 0, under, 1), empty)


@dataclasses.dataclass(frozen=True)
class _Example:
    kept: Any
    groups: tuple[str, ...]
    unit: Hashable


@dataclasses.dataclass(eq=False)
class Metric(abc.ABC):
    """Examples of one metric, kept by id.

    Little and plain data is kept of an example, so a metric can be pickled and sent from one
    process to another; the order of examples never changes a result. Examples may belong to
    groups (splits, languages, question types): every score f is then also given per group, as
    "f/group". Most subclasses keep a few named numbers of each example and report their means.

    Attributes:
      averages: unweighted means over groups, reported as "f/name": over the groups given, or over
        all groups for None. One whose groups have no examples is not reported.
      overall: whether scores over all examples are reported beside those of groups. Not where
        groups cannot be pooled, as CIDEr of two languages.
    """

    averages: Mapping[str, tuple[str, ...] | None] = dataclasses.field(
        default_factory=dict, kw_only=True
    )
    overall: bool = dataclasses.field(default=True, kw_only=True)
    _examples: dict[Id, _Example] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _skipped: dict[Id, str] = dataclasses.field(default_factory=dict, init=False, repr=False)

    expected: ClassVar[str]  # what `add` takes, in one sentence
    main: ClassVar[str]  # the score that says how good one example is

    @classmethod
    def compute(
        cls, predictions: Examples[Any], references: Examples[Any], **settings: Any
    ) -> dict[str, float]:
        """The scores of two lists in one order, or of two mappings from ids.

        `settings` are the metric's. Raises DatasetError that lists every invalid example.
        """
        return cls(**settings).add_all(predictions, references).result()

    def add(
        self,
        id: Id,
        prediction: Any,
        reference: Any,
        *,
        group: str | Sequence[str] = (),
        unit: Hashable = None,
    ) -> None:
        """Adds one example; raises DatasetError if it is invalid, or if the id has been added.

        Args:
          id: of the example.
          prediction, reference: as the metric takes them.
          group: the group it belongs to, or several.
          unit: what it shares with others, such as an image; a bootstrap draws whole units.
        """
        self._add_all([(id, prediction, reference)], group, unit)

    def add_all(self, predictions: Examples[Any], references: Examples[Any]) -> Self:
        """Adds many and returns itself; two mappings from ids, or two lists in one order.

        Raises DatasetError that lists all invalid examples; then none is added.
        """
        self._add_all(_pair(predictions, references))
        return self

    def skip(self, id: Id, reason: str) -> None:
        """Notes an example that could not be predicted; it counts in `skipped` alone."""
        if id in self._examples or id in self._skipped:
            raise _added_twice([id])
        self._skipped[id] = reason

    def merge(self, other: Self) -> None:
        """Adds what another process has; raises DatasetError for another metric or a common id."""
        own = [f.name for f in dataclasses.fields(self) if f.init]
        same = type(self) is type(other)
        if not same or any(getattr(self, name) != getattr(other, name) for name in own):
            raise DatasetError(
                f"{other!r} cannot be merged into {self!r}, expected the same metric and settings"
            )
        known = self._examples.keys() | self._skipped.keys()
        common = known & (other._examples.keys() | other._skipped.keys())
        if common:
            raise _added_twice(sorted(common, key=_sort_key))
        self._examples |= other._examples
        self._skipped |= other._skipped

    def result(self) -> dict[str, float]:
        """Every score by name, with the number of examples: `num`, `skipped`, `num/group`.

        Raises DatasetError if there are no examples.
        """
        values = self.measure()(np.ones((1, len(self._examples))))
        counts = {"num": len(self._examples), "skipped": len(self._skipped)}
        counts |= {f"num/{group}": len(members) for group, members in self._groups().items()}
        return {k: float(v[0]) for k, v in values.items()} | {
            k: float(n) for k, n in counts.items()
        }

    def measure(self) -> Measure:
        """The scores as a function of weights f64[R, n] of the examples, in the order of `ids`."""
        if not self._examples:
            raise DatasetError(
                f"{type(self).__name__} has no examples ({len(self._skipped)} were skipped). Add "
                "some: metric.add(id, prediction, reference)"
            )
        kept, groups = self._kept(), self._groups()
        whole = self._measure(kept) if self.overall or not groups else None
        parts = {g: (m, self._measure([kept[i] for i in m])) for g, m in groups.items()}

        def measure(weights: np.ndarray) -> Values:
            values = whole(weights) if whole else {}
            found = {g: part(weights[:, members]) for g, (members, part) in parts.items()}
            for group, scores in found.items():
                # A score without a name is called by its group.
                values |= {f"{name}/{group}" if name else group: v for name, v in scores.items()}
            for average, members in self.averages.items():
                averaged = [found.get(group, {}) for group in members or found]
                for name in averaged[0] if averaged else ():
                    if all(name in scores for scores in averaged):
                        every = [scores[name] for scores in averaged]
                        values[f"{name}/{average}"] = np.mean(every, axis=0)
            return values

        return measure

    @property
    def ids(self) -> list[Id]:
        """Of all examples that count, numbers first, sorted."""
        return sorted(self._examples, key=_sort_key)

    @property
    def skipped(self) -> dict[Id, str]:
        """Why examples do not count, by id."""
        return dict(self._skipped)

    @property
    def example_scores(self) -> dict[Id, float]:
        """How good each prediction is, higher is better: to find the best and the worst."""
        kept, scores = self._kept(), np.zeros(len(self._examples))
        # Where groups cannot be pooled, an example is scored within its first group.
        parts = list(self._groups(first_only=True).values()) if not self.overall else []
        for members in parts or ([list(range(len(kept)))] if kept else []):
            scores[members] = self._example_scores([kept[i] for i in members])
        return {id: float(value) for id, value in zip(self.ids, scores, strict=True)}

    @property
    def units(self) -> list[Hashable]:
        """What each example belongs to, in the order of `ids`."""
        return [self._examples[id].unit for id in self.ids]

    @property
    def definition(self) -> str:
        """The rule of the metric, in words."""
        return inspect.getdoc(type(self)) or ""

    @abc.abstractmethod
    def _keep(self, prediction: Any, reference: Any) -> Any:
        """What is kept of one example: numbers by name, unless `_measure` is overridden.

        An example may lack some of the numbers. Raises InvalidExample.
        """

    def _measure(self, kept: Sequence[Any]) -> Measure:
        names, table, present = _table(kept)
        return lambda weights: self._from_sums(names, weights @ table, weights @ present)

    def _example_scores(self, kept: Sequence[Any]) -> np.ndarray:
        """f64[n]; see `example_scores`."""
        return self._from_sums(*_table(kept))[self.main]

    def _from_sums(self, names: Sequence[str], sums: np.ndarray, counts: np.ndarray) -> Values:
        total = dict(zip(names, sums.T, strict=True))
        means = dict(zip(names, divide(sums, counts).T, strict=True))
        return self._summarize(total, means)

    def _summarize(self, sums: Values, means: Values) -> Values:
        """The scores f64[R] that follow from sums and means over examples; by default the means."""
        return means

    def _unit(self, kept: Any) -> Hashable:
        """What an example belongs to where `add` does not say; None: it is on its own."""
        return None

    def _kept(self) -> list[Any]:
        return [self._examples[id].kept for id in self.ids]

    def _groups(self, first_only: bool = False) -> dict[str, list[int]]:
        """Places of the members of each group in `ids`."""
        groups: dict[str, list[int]] = {}
        for place, id in enumerate(self.ids):
            named = self._examples[id].groups
            for group in named[:1] if first_only else named:
                groups.setdefault(group, []).append(place)
        return dict(sorted(groups.items()))

    def _add_all(
        self, examples: Sequence[tuple[Id, Any, Any]], group: Any = (), unit: Hashable = None
    ) -> None:
        added: dict[Id, _Example] = {}
        problems = []
        groups = (group,) if isinstance(group, str) else tuple(group)
        for id, prediction, reference in examples:
            if id in self._examples or id in self._skipped:
                problems.append(f"{id!r} has been added before")
            try:
                kept = self._keep(prediction, reference)
            except InvalidExample as e:
                problems.append(f"{id!r}: {e}")
                continue
            own = unit if unit is not None else self._unit(kept)
            added[id] = _Example(kept, groups, id if own is None else own)
        if problems:
            fix = "Correct these examples, or skip each: metric.skip(id, reason)"
            raise data_error(problems, f"Expected {self.expected}.", fix)
        self._examples |= added


def _table(kept: Sequence[Mapping[str, float]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of all numbers, their values f64[n, names] (0 where missing), and 1 where not."""
    names = list(dict.fromkeys(name for numbers in kept for name in numbers))
    table = np.array([[one.get(name, np.nan) for name in names] for one in kept], np.float64)
    return names, np.nan_to_num(table), (~np.isnan(table)).astype(np.float64)


def _pair(predictions: Examples[Any], references: Examples[Any]) -> list[tuple[Id, Any, Any]]:
    """(id, prediction, reference) of every example, in the order of the references."""
    if isinstance(predictions, Mapping) and isinstance(references, Mapping):
        missing = [id for id in references if id not in predictions]
        unknown = [id for id in predictions if id not in references]
        problems = [f"{id!r} has a reference, but no prediction" for id in missing]
        problems += [f"{id!r} has a prediction, but no reference" for id in unknown]
        if problems:
            part = "To score a part: {id: references[id] for id in predictions}"
            raise data_error(problems, "Expected the same ids on both sides.", part)
        return [(id, predictions[id], reference) for id, reference in references.items()]
    lists = not any(isinstance(side, str | Mapping) for side in (predictions, references))
    if not lists or len(predictions) != len(references):
        kinds = [f"{type(side).__name__} of {len(side)}" for side in (predictions, references)]
        raise data_error(
            [f"the predictions are a {kinds[0]}, the references a {kinds[1]}"],
            "Expected two lists of one length and order, or two mappings from ids.",
            "Call for example: exact_match(['a cat'], ['a cat'])",
        )
    return [(i, p, r) for i, (p, r) in enumerate(zip(predictions, references, strict=True))]


def _sort_key(id: Id) -> tuple[bool, Any]:
    """Numbers by size and before strings, so that results do not depend on who came first."""
    return isinstance(id, str), id


def _added_twice(ids: Sequence[Id]) -> DatasetError:
    problems = [f"{id!r} has been added before" for id in ids]
    return data_error(problems, "Expected every id once.", "Give each process its own examples.")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A score and the bounds of its confidence interval, in the score's unit."""

    value: float
    low: float
    high: float


def bootstrap(
    metric: Metric, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """A confidence interval for every score of a metric, by the percentile bootstrap.

    As many examples as there are, are drawn with replacement `resamples` times and scored: the
    bounds are the (1 +- confidence) / 2 quantiles. Examples of one unit (see `Metric.add`) are
    drawn together. For CIDEr the weights of n-grams stay those of all examples. Where every
    example scores alike the interval is one point: no resample can show what the examples do not.
    The same seed gives the same interval.

    Source: Efron, Bootstrap Methods: Another Look at the Jackknife, 1979.

    Raises ConfigError for other settings, DatasetError without examples.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ConfigError(
            "expected at least 1 resample and a confidence between 0 and 1, got "
            f"resamples={resamples}, confidence={confidence}"
        )
    measure, units = metric.measure(), metric.units
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
        count = min(step, resamples - start)
        # One draw a sample, so that the size of a step changes nothing.
        drawn = [
            np.bincount(rng.integers(units, size=units), minlength=units) for _ in range(count)
        ]
        yield np.array(drawn, np.float64)
