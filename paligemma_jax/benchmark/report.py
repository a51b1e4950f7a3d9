"""A run as tables for people: aligned for a terminal, or in Markdown.

Whether two implementations answer the same, without which their speeds say nothing.

Whether two implementations train the same: the losses of their first steps.

From the records of all processes to one row for each case of each implementation.

The rows of a run, as goals ask for them.

What is aimed at in training, beside Hugging Face's and of the device's arithmetic.

What is aimed at, as ratios within one run, and whether a run got there.

All that one run has found out.
"""

import collections
import dataclasses
import enum
import functools
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.benchmark.subjects import (
    PEERS,
    TRAINING,
    Ceilings,
    Kind,
    Precision,
    Record,
    Task,
    Work,
    losses_of,
    train_rates,
)

# Of the largest logit, in float32: what different orders of summation leave.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Greedy answers and logits of two implementations with the same weights and prompts.

    Attributes:
      equal: of `tokens` that were answered, those before the first difference in each row.
      difference: the largest of logits after the prompt, which reach `largest`.
      same: whether both compute the same. In float32 all tokens are equal and logits nearly. In
        another precision the logits of the first one are at most twice as far from the peer's in
        float32 as the peer's own; tokens may differ, since near ties are decided by rounding.
    """

    model: str
    dtype: Precision
    first: Kind
    second: Kind
    tokens: int
    equal: int
    difference: float
    largest: float
    same: bool

    @property
    def task(self) -> Task:
        """What was compared."""
        return Task.ANSWER

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Comparison":
        """Inverse of `to_dict`."""
        enums = {
            "dtype": Precision(values["dtype"]),
            "first": Kind(values["first"]),
            "second": Kind(values["second"]),
        }
        return cls(**{**values, **enums})

    def __str__(self) -> str:
        verdict = "the same" if self.same else "NOT the same: no speed counts"
        return (
            f"{self.model} {self.dtype}: {self.first} and {self.second} answer {verdict} "
            f"({self.equal} of {self.tokens} tokens equal, logits differ by {self.difference:.1e} "
            f"of {self.largest:.3g})"
        )


def compare(folder: Path, model: str) -> list[Comparison]:
    """Compares this library with each peer, in each precision that both have left arrays of."""
    found: dict[tuple[Kind, Precision], dict[str, np.ndarray]] = {}
    for kind, dtype in itertools.product(Kind, Precision):
        path = folder / f"{model}-{kind}-{dtype}.npz"
        if path.exists():
            with np.load(path) as arrays:
                found[kind, dtype] = dict(arrays)
    exact = found.get((Kind.HUGGING_FACE, Precision.FLOAT32))
    return [
        _compare(model, dtype, kind, found[Kind.OURS, dtype], theirs, exact)
        for (kind, dtype), theirs in found.items()
        if kind is not Kind.OURS and (Kind.OURS, dtype) in found
    ]


def _compare(
    model: str,
    dtype: Precision,
    kind: Kind,
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    exact: dict[str, np.ndarray] | None,
) -> Comparison:
    matching = np.cumprod(ours["tokens"] == theirs["tokens"], axis=1)
    largest = float(np.abs(theirs["logits"]).max())
    difference = _difference(ours, theirs)
    tokens, equal = matching.size, int(matching.sum())
    if dtype is Precision.FLOAT32 or exact is None:
        allowed = TOLERANCE * largest if dtype is Precision.FLOAT32 else np.inf
        same = equal == tokens and difference <= allowed
    else:
        same = _difference(ours, exact) <= 2 * _difference(theirs, exact)
    return Comparison(
        model=model,
        dtype=dtype,
        first=Kind.OURS,
        second=kind,
        tokens=tokens,
        equal=equal,
        difference=difference,
        largest=largest,
        same=bool(same),
    )


def _difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return float(np.abs(one["logits"] - other["logits"]).max())


# Of the loss: what orders of summation leave in float32, and roundings of activations else.
TOLERANCES = {Precision.FLOAT32: 1e-4, Precision.BFLOAT16: 1e-2}


@dataclasses.dataclass(frozen=True)
class LossComparison:
    """Losses of two implementations from the same weights, adapters and batch, step by step.

    Attributes:
      ours, theirs: the losses; each later one is after one more update.
      difference: the largest, relative; infinite where their numbers of steps differ.
      same: whether it is within the tolerance.
    """

    model: str
    dtype: Precision
    task: Task
    first: Kind
    second: Kind
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def difference(self) -> float:
        """See above."""
        if not self.ours or len(self.ours) != len(self.theirs):
            return float("inf")
        ours, theirs = np.array(self.ours), np.array(self.theirs)
        return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))

    @property
    def same(self) -> bool:
        """See above; False for losses that are no numbers."""
        return self.difference <= TOLERANCES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"difference": self.difference, "same": self.same}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LossComparison":
        """Inverse of `to_dict`."""
        return cls(
            values["model"],
            Precision(values["dtype"]),
            Task(values["task"]),
            Kind(values["first"]),
            Kind(values["second"]),
            tuple(values["ours"]),
            tuple(values["theirs"]),
        )

    def __str__(self) -> str:
        verdict = "the same" if self.same else "NOT the same: no speed counts"
        ours, theirs = (" ".join(f"{x:.5f}" for x in losses) for losses in (self.ours, self.theirs))
        return (
            f"{self.model} {self.dtype}: {self.first} and {self.second} train {verdict} "
            f"({self.task}: losses {ours} and {theirs} differ by {self.difference:.1e})"
        )


def compare_losses(records: Sequence[Record], model: str) -> list[LossComparison]:
    """Compares this library with each peer, in each task and precision that both have losses of."""
    found: dict[tuple[Task, Precision, Kind], tuple[float, ...]] = {}
    for record in records:
        losses = losses_of(record.numbers)
        if record.model == model and losses:
            found.setdefault((record.task, record.dtype, record.kind), tuple(losses))
    return [
        LossComparison(model, dtype, task, Kind.OURS, kind, found[task, dtype, Kind.OURS], theirs)
        for (task, dtype, kind), theirs in found.items()
        if kind is not Kind.OURS and (task, dtype, Kind.OURS) in found
    ]


QUIET = 0.15  # share of all CPUs that others may use while a sample is taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One case of one implementation in one precision.

    Attributes:
      median, fastest: seconds of one call, or of one token a row.
      spread: slowest less fastest, over the median.
      samples, disturbed: how many count, and how many do not since other processes were busy; where
        they always were, all count and `disturbed` is all.
      per_second: pictures or tokens.
      bandwidth, rate: bytes and operations a second, of those that are needed at least.
      share: of the speed that the machine allows, by the ceilings measured in the same repeat.
      peer, ratio: seconds of the fastest peer in the same precision, and over ours.
      numbers: medians of whatever else was found out.
      task: what the processes did with the model.
      equal: whether outputs were compared and are the same; None where they were not compared.
    """

    model: str
    case: str
    kind: Kind
    dtype: Precision
    median: float | None = None
    fastest: float | None = None
    spread: float | None = None
    samples: int = 0
    disturbed: int = 0
    per_second: float | None = None
    bandwidth: float | None = None
    rate: float | None = None
    share: float | None = None
    peer: float | None = None
    ratio: float | None = None
    peak_bytes: int | None = None
    compilations: int | None = None
    compile_seconds: float | None = None
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    equal: bool | None = None
    error: str | None = None
    task: Task = Task.ANSWER

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def summarize(
    records: Sequence[Record],
    comparisons: Sequence[Comparison | LossComparison],
    *,
    on_cpu: bool,
) -> list[Row]:
    """One row a case and implementation, in the order in which they were first measured."""
    groups: dict[tuple[str, Task, str, Kind, Precision], list[Record]] = {}
    for record in records:
        key = (record.model, record.task, record.case, record.kind, record.dtype)
        groups.setdefault(key, []).append(record)
    ceilings = _Ceilings(records, on_cpu)
    rows = [_row(group, ceilings, comparisons) for group in groups.values()]
    return [_beside_peer(row, rows) for row in rows]


def _row(
    records: list[Record],
    ceilings: "_Ceilings",
    comparisons: Sequence[Comparison | LossComparison],
) -> Row:
    first = records[0]
    row = Row(
        model=first.model,
        case=first.case,
        kind=first.kind,
        dtype=first.dtype,
        task=first.task,
        equal=_equal(first, comparisons),
        numbers=_medians(record.numbers for record in records),
        peak_bytes=max((r.peak_bytes for r in records if r.peak_bytes is not None), default=None),
        compilations=first.compilations,
        compile_seconds=first.compile_seconds,
        error=next((record.error for record in records if record.error), None),
    )
    samples = [seconds for record in records for seconds in quiet_samples(record)]
    if not samples:
        return row
    median = statistics.median(samples)
    if median <= 0:  # a difference of two times
        return dataclasses.replace(row, error="too little work to be told from noise")
    flops, moved = sum(first.flops), sum(first.bytes)
    per_second = first.rows / median if first.rows else None
    numbers = row.numbers
    if first.task in TRAINING and per_second:
        numbers = numbers | train_rates(numbers, per_second, flops / median)
    shares = [share for record in records if (share := _summary_share(record, ceilings))]
    return dataclasses.replace(
        row,
        median=median,
        fastest=min(samples),
        spread=(max(samples) - min(samples)) / median,
        samples=len(samples),
        disturbed=sum(other > QUIET for record in records for other in record.others),
        per_second=per_second,
        numbers=numbers,
        bandwidth=moved / median if moved else None,
        rate=flops / median if flops else None,
        share=statistics.median(shares) if shares else None,
    )


def quiet_samples(record: Record) -> list[float]:
    """Seconds of the samples during which little else ran; of all, where something always did."""
    others = record.others or (0.0,) * len(record.seconds)
    quiet = [s for s, other in zip(record.seconds, others, strict=True) if other <= QUIET]
    return quiet or list(record.seconds)


def _summary_share(record: Record, ceilings: "_Ceilings") -> float | None:
    samples, limits = quiet_samples(record), ceilings.of(record)
    if not samples or not record.flops or limits is None:
        return None
    median = statistics.median(samples)
    parts = [Work(f, b) for f, b in zip(record.flops, record.bytes, strict=True)]
    return limits.seconds(*parts) / median if median > 0 else None


class _Ceilings:
    """Those of each repeat: memory bandwidth changes with what the neighbours of a machine do."""

    def __init__(self, records: Iterable[Record], on_cpu: bool):
        self._found = [record for record in records if "read" in record.numbers]
        self._on_cpu = on_cpu

    def of(self, record: Record) -> Ceilings | None:
        """Measured in the same process, else in the same repeat, else at any time."""

        def distance(found: Record) -> tuple[bool, ...]:
            return (
                found.model != record.model,
                found.repeat != record.repeat,
                found.dtype is not record.dtype,
            )

        if not self._found:
            return None
        nearest = min(self._found, key=distance).numbers
        # Decoding only reads. A GPU reads no faster than it copies; a CPU copies faster.
        best = nearest["read"] if self._on_cpu else max(nearest["read"], nearest["copy"])
        return Ceilings(best, nearest[record.dtype.floats.value])


def _beside_peer(row: Row, rows: Sequence[Row]) -> Row:
    if row.kind in PEERS or row.median is None:
        return row
    peers = [
        other.median
        for other in rows
        if other.kind in PEERS
        and (other.model, other.case, other.dtype) == (row.model, row.case, row.dtype)
        and other.median is not None
    ]
    if not peers:
        return row
    return dataclasses.replace(row, peer=min(peers), ratio=min(peers) / row.median)


def _equal(record: Record, comparisons: Sequence[Comparison | LossComparison]) -> bool | None:
    about = [
        comparison.same
        for comparison in comparisons
        if comparison.model == record.model
        and comparison.task is record.task
        and comparison.dtype is record.dtype
        and (record.kind in (Kind.OURS, comparison.second))
    ]
    return all(about) if about else None


def _medians(numbers: Iterable[dict[str, float]]) -> dict[str, float]:
    lists: dict[str, list[float]] = collections.defaultdict(list)
    for found in numbers:
        for name, number in found.items():
            lists[name].append(number)
    return {name: statistics.median(values) for name, values in lists.items()}


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


Value = Callable[[Rows], float | None]


def faster(dtype: Precision) -> Value:
    """How many samples of ours a second for one of Hugging Face's."""

    def value(rows: Rows) -> float | None:
        ours, theirs = _pair(rows, dtype)
        if ours is None or theirs is None or not ours.median or not theirs.median:
            return None
        return theirs.median / ours.median

    return value


def smaller(dtype: Precision) -> Value:
    """Our peak memory by Hugging Face's."""

    def value(rows: Rows) -> float | None:
        ours, theirs = _pair(rows, dtype)
        if ours is None or theirs is None or not ours.peak_bytes or not theirs.peak_bytes:
            return None
        return ours.peak_bytes / theirs.peak_bytes

    return value


def utilisation(dtype: Precision) -> Value:
    """MFU of ours: operations a second by the most that the device's maker tells."""

    def value(rows: Rows) -> float | None:
        ours = rows.trained(Kind.OURS, dtype)
        peak = None if ours is None else ours.numbers.get("datasheet_rate")
        return None if ours is None or peak is None or not ours.rate else ours.rate / peak

    return value


def _pair(rows: Rows, dtype: Precision) -> tuple[Row | None, Row | None]:
    return rows.trained(Kind.OURS, dtype), rows.trained(Kind.HUGGING_FACE, dtype)


F32, BF16 = Precision.FLOAT32, Precision.BFLOAT16
MID = "mid"
GPU_3B = ("paligemma-3b-pt-224", "paligemma2-3b-pt-224")

COLD, WARM = "cold start", "warm start"


class Verdict(enum.StrEnum):
    """How a goal was met."""

    STRETCH = "pass, stretch too"
    PASS = "pass"
    FAIL = "FAIL"
    NOT_RUN = "not run"
    NOT_EQUAL = "does not count: outputs differ"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A ratio to reach: at least `target`, or at most where `at_most`; `stretch` is better."""

    what: str
    value: Callable[[Rows], float | None]
    target: float
    stretch: float | None = None
    at_most: bool = False
    task: Task = Task.ANSWER

    def judge(self, rows: Rows) -> "Judged":
        """The verdict on a model's rows."""
        value = self.value(rows)
        if value is None:
            verdict = Verdict.NOT_RUN
        elif not rows.equal:
            verdict = Verdict.NOT_EQUAL
        elif self.stretch is not None and self._reached(value, self.stretch):
            verdict = Verdict.STRETCH
        else:
            verdict = Verdict.PASS if self._reached(value, self.target) else Verdict.FAIL
        return Judged(self.what, rows.model, self._wanted(), value, verdict)

    def _reached(self, value: float, target: float) -> bool:
        return value <= target if self.at_most else value >= target

    def _wanted(self) -> str:
        sign = "at most" if self.at_most else "at least"
        more = "" if self.stretch is None else f" ({self.stretch:g})"
        return f"{sign} {self.target:g}{more}"


@dataclasses.dataclass(frozen=True)
class Judged:
    """A goal, what was measured, and the verdict."""

    what: str
    model: str
    wanted: str
    value: float | None
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def judge(rows: Sequence[Row], *, on_cpu: bool) -> list[Judged]:
    """Every goal of both kinds of machines; those of the other kind are "not run"."""
    measured = list(dict.fromkeys((row.model, row.task) for row in rows))
    judged = []
    for machine, goals in (("CPU", CPU_GOALS), ("GPU", GPU_GOALS)):
        here = on_cpu == (machine == "CPU")
        for models, goal in goals:
            chosen = [m for m, task in measured if here and task is goal.task]
            chosen = [m for m in chosen if models is None or m in models]
            for model in [m for m in chosen if m != "tiny"] or [_not_measured(models)]:
                found = rows if here else ()
                result = goal.judge(Rows(model, found, goal.task))
                judged.append(dataclasses.replace(result, what=f"{machine}: {result.what}"))
    return judged


def _not_measured(models: tuple[str, ...] | None) -> str:
    return models[0] if models else "any"


def _over(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _goals_share(case: str, dtype: Precision) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        row = rows.find(case, dtype=dtype)
        return None if row is None else row.share

    return value


def _against(case: str, dtype: Precision, *kinds: Kind) -> Callable[[Rows], float | None]:
    """How many times as long the fastest of `kinds` takes."""

    def value(rows: Rows) -> float | None:
        found = [rows.median(case, kind, dtype) for kind in kinds]
        peers = [seconds for seconds in found if seconds is not None]
        return _over(min(peers, default=None), rows.median(case, dtype=dtype))

    return value


def _best_against_bfloat16(rows: Rows) -> float | None:
    peer = rows.median(DECODE, Kind.HUGGING_FACE, BF16)
    return _over(peer, rows.best(DECODE))


def _growth(case: str, other: str, dtype: Precision) -> Callable[[Rows], float | None]:
    return lambda rows: _over(rows.median(case, dtype=dtype), rows.median(other, dtype=dtype))


def _goals_number(case: str, name: str) -> Callable[[Rows], float | None]:
    return lambda rows: rows.number(case, name)


def _programs(rows: Rows) -> float | None:
    return _over(rows.number(MIXED, "most_often"), rows.number(MIXED, "buckets"))


def _start(rows: Rows) -> float | None:
    found = [(rows.median(WARM, dtype=d), rows.median(COLD, dtype=d)) for d in Precision]
    return next((_over(warm, cold) for warm, cold in found if warm and cold), None)


def _start_programs(rows: Rows) -> float | None:
    return _over(rows.number(WARM, "programs"), rows.number(COLD, "programs"))


DECODE, FIRST = "decode, batch 1", "first token, batch 1"
EIGHT, SIXTY_FOUR = "decode, batch 8", "decode, batch 64"
LONG, MEMORY = "long answer, batch 1", "memory in decoding, batch 1"
MIXED = "50 prompts of mixed lengths"
_LIKE = "ms per token, 256 new against 16"
_SAME = "programs for 50 mixed prompts, by the number of buckets"
_WARM = "warm start by cold start"
_WARM_PROGRAMS = "programs of a warm start by those of a cold one"
_PEAK = "peak memory in decoding by weights and cache"

Aimed = tuple[tuple[str, ...] | None, Goal]  # for which models; None is all but tiny


def _training(models: tuple[str, ...] | None, dtype: Precision) -> list[Aimed]:
    goals: list[Aimed] = []
    for task in TRAINING:
        what = "LoRA" if task is Task.LORA else "full"
        speed = Goal(
            f"{what} training, samples a second against Hugging Face", faster(dtype), 1.4, 2.0,
            task=task,
        )  # fmt: skip
        memory = Goal(
            f"{what} training, peak memory by Hugging Face's", smaller(dtype), 0.6, 0.45,
            at_most=True, task=task,
        )  # fmt: skip
        goals += [(models, speed), (models, memory)]
    return goals


CPU_GOALS: list[Aimed] = [
    (None, Goal("decode float32, share of the memory floor", _goals_share(DECODE, F32), 0.75)),
    (
        None,
        Goal("decode float32 against Hugging Face", _against(DECODE, F32, *PEERS), 1.8),
    ),
    (None, Goal("decode, our best against Hugging Face bfloat16", _best_against_bfloat16, 1.0)),
    (
        (MID,),
        Goal("decode float32 against big_vision's way", _against(DECODE, F32, Kind.SCANNED), 4.0),
    ),
    (None, Goal("image + prefill float32 against Hugging Face", _against(FIRST, F32, *PEERS), 2.0)),
    (
        None,
        Goal(
            "image + prefill bfloat16 against Hugging Face",
            _against(FIRST, BF16, *PEERS),
            0.9,
            1.1,
        ),
    ),
    (None, Goal("step of batch 8 by batch 1", _growth(EIGHT, DECODE, F32), 1.7, at_most=True)),
    (None, Goal(_LIKE, _goals_number(LONG, "ratio"), 1.05, at_most=True)),
    (None, Goal(_SAME, _programs, 1.0, at_most=True)),
    (None, Goal(_WARM, _start, 0.3, at_most=True)),
    (None, Goal(_WARM_PROGRAMS, _start_programs, 0.3, at_most=True)),
    (None, Goal(_PEAK, _goals_number(MEMORY, "ratio"), 1.10, at_most=True)),
    *_training(None, F32),
]


def _first_share(model: str, target: float, stretch: float) -> Aimed:
    what = "image + prefill, share of the floor"
    return (model,), Goal(what, _goals_share(FIRST, BF16), target, stretch)


def _decode_share(models: tuple[str, ...], target: float, stretch: float) -> Aimed:
    what = "decode bfloat16, share of the memory floor"
    return models, Goal(what, _goals_share(DECODE, BF16), target, stretch)


GPU_GOALS: list[Aimed] = [
    _decode_share(GPU_3B, 0.65, 0.80),
    _decode_share(("paligemma2-10b-pt-224",), 0.78, 0.88),
    _decode_share(("paligemma2-28b-pt-224",), 0.88, 0.95),
    (
        GPU_3B,
        Goal(
            "decode against Hugging Face, eager",
            _against(DECODE, BF16, Kind.HUGGING_FACE),
            8.0,
            15.0,
        ),
    ),
    (
        GPU_3B,
        Goal(
            "decode against Hugging Face, compiled",
            _against(DECODE, BF16, Kind.HUGGING_FACE_COMPILED),
            1.0,
            1.3,
        ),
    ),
    (
        GPU_3B,
        Goal("image + prefill against Hugging Face", _against(FIRST, BF16, *PEERS), 1.2, 1.5),
    ),
    _first_share("paligemma-3b-pt-224", 0.50, 0.65),
    _first_share("paligemma-3b-pt-448", 0.60, 0.70),
    _first_share("paligemma-3b-pt-896", 0.55, 0.65),
    (GPU_3B, Goal("step of batch 8 by batch 1", _growth(EIGHT, DECODE, BF16), 1.15, at_most=True)),
    (
        GPU_3B,
        Goal("step of batch 64 by batch 1", _growth(SIXTY_FOUR, DECODE, BF16), 1.6, at_most=True),
    ),
    (GPU_3B, Goal(_LIKE, _goals_number(LONG, "ratio"), 1.05, at_most=True)),
    (GPU_3B, Goal(_SAME, _programs, 1.0, at_most=True)),
    (GPU_3B, Goal(_WARM, _start, 0.3, at_most=True)),
    (GPU_3B, Goal(_WARM_PROGRAMS, _start_programs, 0.3, at_most=True)),
    (None, Goal(_PEAK, _goals_number(MEMORY, "ratio"), 1.03, at_most=True)),
    *_training(GPU_3B, BF16),
    *[
        (GPU_3B, Goal(f"{what} training, MFU", utilisation(BF16), 0.42, 0.5, task=task))
        for task, what in ((Task.FULL, "full"), (Task.LORA, "LoRA"))
    ],
]


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

        return as_text(self)

    def to_markdown(self) -> str:
        """The same as tables of Markdown."""

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


Cells = list[str]
HEADINGS = [
    "case", "implementation", "median", "min", "spread", "per s", "GB/s", "TFLOP/s", "of floor",
    "peer", "ratio", "peak GB", "programs",
]  # fmt: skip
GOAL_HEADINGS = ["goal", "model", "wanted", "measured", "verdict"]
_HIDDEN = ("ceilings", "equality")  # said above the table


def as_text(result: BenchmarkResult) -> str:
    """For a terminal."""
    return "\n".join(_document(result, _aligned, lambda title: f"\n{title}"))


def as_markdown(result: BenchmarkResult) -> str:
    """For a file."""
    return "\n".join(_document(result, _piped, lambda title: f"\n### {title}\n"))


def _document(
    result: BenchmarkResult,
    table: Callable[[Cells, Sequence[Cells]], list[str]],
    heading: Callable[[str], str],
) -> list[str]:
    about = result.environment
    lines = [f"Size {result.size}. " + "; ".join(f"{k} {v}" for k, v in about.items())]
    lines += list(result.notes)
    for model in dict.fromkeys(row.model for row in result.rows):
        rows = [row for row in result.rows if row.model == model]
        lines.append(heading(model))
        lines += [f"{line}  " for line in _above(result, model)]
        lines.append("")
        timed = [row for row in rows if row.median is not None]
        order = list(dict.fromkeys(row.case for row in timed))
        timed.sort(key=lambda row: order.index(row.case))
        lines += table(HEADINGS, _without_repetition([_cells(row) for row in timed]))
        found = [_found(row) for row in rows]
        lines += ["", *(line for line in found if line)]
        failed = [row for row in rows if row.error]
        lines += [f"{row.case}, {row.kind} {row.dtype}: {row.error}" for row in failed]
    lines.append(heading("Goals"))
    goals = [
        [goal.what, goal.model, goal.wanted, _report_number(goal.value), str(goal.verdict)]
        for goal in result.goals
    ]
    lines += table(GOAL_HEADINGS, goals)
    return [line.rstrip() for line in lines]


def _above(result: BenchmarkResult, model: str) -> list[str]:
    """Equality and ceilings of one model."""
    lines = [str(c) for c in result.comparisons if c.model == model]
    found = [r.numbers for r in result.records if r.model == model and "read" in r.numbers]
    if found:
        units = {"read": "GB/s", "copy": "GB/s", "float32": "TFLOP/s", "bfloat16": "TFLOP/s"}
        parts = []
        for name, unit in units.items():
            scale = 1e9 if unit == "GB/s" else 1e12
            values = sorted(numbers[name] / scale for numbers in found)
            span = _report_number(values[0])
            span += "" if len(values) == 1 else f" to {_report_number(values[-1])}"
            parts.append(f"{name} {span} {unit}")
        lines.append("This machine at best: " + ", ".join(parts))
    return lines


def _cells(row: Row) -> Cells:
    assert row.median is not None
    mark = "" if row.equal is not False else " (outputs differ)"
    programs = "" if row.compilations is None else f"{row.compilations}"
    if row.compile_seconds:
        programs += f" in {row.compile_seconds:.1f} s"
    return [
        row.case,
        f"{row.kind} {row.dtype}{mark}",
        _seconds(row.median),
        _seconds(row.fastest),
        _percent(row.spread),
        _report_number(row.per_second),
        _report_number(row.bandwidth, 1e9),
        _report_number(row.rate, 1e12),
        _percent(row.share),
        _seconds(row.peer),
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        _report_number(row.peak_bytes, 1e9),
        programs,
    ]


def _found(row: Row) -> str | None:
    """The numbers of cases that are no times."""
    if row.case in _HIDDEN or not row.numbers:
        return None
    numbers = dict(row.numbers)
    parts = [
        f"{name.removesuffix('_bytes')} {value / 1e9:.3f} GB"
        if name.endswith("_bytes")
        else f"{name.replace('_', ' ')} {_report_number(value)}"
        for name, value in numbers.items()
    ]
    return f"{row.case}, {row.kind} {row.dtype}: {', '.join(parts)}"


def _without_repetition(rows: Sequence[Cells]) -> list[Cells]:
    """Names a case only in the first of its rows."""
    before = itertools.chain([""], (row[0] for row in rows))
    return [["" if row[0] == last else row[0], *row[1:]] for row, last in zip(rows, before)]  # noqa: B905


def _aligned(headings: Cells, rows: Sequence[Cells]) -> list[str]:
    used = [i for i, _ in enumerate(headings) if any(row[i] for row in rows)]
    lines = [[row[i] for i in used] for row in [headings, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = sum(heading in ("case", "implementation", *GOAL_HEADINGS) for heading in headings)
    text = [
        "  ".join(
            f"{cell:<{width}}" if i < words else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return [text[0], "-" * len(text[0]), *text[1:]]


def _piped(headings: Cells, rows: Sequence[Cells]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 10 else f"{_report_number(value * 1e3)} ms"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}".replace("%", " %")


def _report_number(value: float | None, scale: float = 1.0) -> str:
    """Three digits; more where they are before the point."""
    if value is None:
        return ""
    value /= scale
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
