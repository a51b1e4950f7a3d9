"""From the records of all processes to one row for each case of each implementation."""

import collections
import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from paligemma_jax.benchmark.equality import Comparison
from paligemma_jax.benchmark.floors import Ceilings, Work
from paligemma_jax.benchmark.implementation import PEERS, Kind, Precision
from paligemma_jax.benchmark.record import Record
from paligemma_jax.benchmark.task import TRAINING, Task
from paligemma_jax.benchmark.train_case import train_rates
from paligemma_jax.benchmark.train_equality import LossComparison

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
    shares = [share for record in records if (share := _share(record, ceilings))]
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


def _share(record: Record, ceilings: "_Ceilings") -> float | None:
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
