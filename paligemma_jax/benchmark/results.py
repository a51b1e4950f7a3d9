"""What was found out: results of processes, comparisons of their outputs, and measurements.

A measurement is what the report has a line for: the results of one case of one implementation in
one precision, from all processes.
"""

import collections
import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.benchmark import BASELINES, TRAINING, Implementation, Precision, Task
from paligemma_jax.benchmark.measure import Roofline, Work
from paligemma_jax.benchmark.plan import Run

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One case in one process.

    Attributes:
      seconds: the samples.
      other_cpu: for each, the fraction of all CPUs that other processes used meanwhile.
      unit, units: what one sample yields, and how many; see `Case`.
      flops, bytes: for each part of the work, what it must do and move at least.
      compilations: programs that JAX compiled for it; None for a baseline.
      peak_bytes: peak memory of the process so far.
      numbers: what else was found out.
      error: why it could not be measured.
    """

    model: str
    task: Task
    implementation: Implementation
    dtype: Precision
    repeat: int
    case: str
    seconds: tuple[float, ...] = ()
    other_cpu: tuple[float, ...] = ()
    unit: str = ""
    units: int = 0
    flops: tuple[float, ...] = ()
    bytes: tuple[float, ...] = ()
    compilations: int | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    error: str | None = None

    @classmethod
    def of(cls, run: Run, case: str, **found: Any) -> "CaseResult":
        """Of a case of a run."""
        about = {name: getattr(run, name) for name in ("model", "task", "implementation", "dtype")}
        return cls(**about, repeat=run.repeat, case=case, **found)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CaseResult":
        """Inverse of `dataclasses.asdict`, by way of JSON."""
        enums = {"task": Task, "implementation": Implementation, "dtype": Precision}
        tuples = dict.fromkeys(("seconds", "other_cpu", "flops", "bytes"), tuple)
        changed = {name: make(values[name]) for name, make in (enums | tuples).items()}
        return cls(**{**values, **changed})


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Outputs of this library and a baseline, from the same weights and inputs.

    Inference compares greedy tokens and the logits after the prompt. In float32 all tokens must be
    equal, and logits nearly. In another precision our logits must be at most twice as far from the
    baseline's in float32 as the baseline's own are; tokens may differ, since near ties are decided
    by rounding. Training compares the losses of the first steps.

    Attributes:
      equal: whether both compute the same.
      difference: the largest one, relative to the largest logit or to the loss.
      details: for people.
    """

    model: str
    task: Task
    dtype: Precision
    implementation: Implementation
    equal: bool
    difference: float
    details: str

    def __str__(self) -> str:
        what = "outputs" if self.task is Task.INFERENCE else f"losses ({self.task})"
        verdict = "are equal" if self.equal else "DIFFER: no speed counts"
        return (
            f"{self.model} {self.dtype}: {what} of {Implementation.OURS} and {self.implementation} "
            f"{verdict} ({self.details})"
        )


def outputs_file(
    folder: Path, model: str, task: Task, dtype: Precision, implementation: Implementation
) -> Path:
    """Where a process leaves its outputs for `compare`."""
    return folder / f"{model}-{task}-{dtype}-{implementation}.npz"


def compare(folder: Path, model: str) -> list[Comparison]:
    """Compares this library with all else that has left outputs for the same task and precision."""
    found: dict[tuple[Task, Precision, Implementation], Arrays] = {}
    for key in itertools.product(Task, Precision, Implementation):
        path = outputs_file(folder, model, *key)
        if path.exists():
            with np.load(path) as arrays:
                found[key] = dict(arrays)
    comparisons = []
    for (task, dtype, implementation), theirs in found.items():
        ours = found.get((task, dtype, Implementation.OURS))
        if ours is None or implementation is Implementation.OURS:
            continue
        if task is Task.INFERENCE:
            exact = found.get((task, Precision.FLOAT32, Implementation.HUGGING_FACE))
            verdict = _compare_outputs(ours, theirs, dtype, exact)
        else:
            verdict = _compare_losses(ours["losses"], theirs["losses"], dtype)
        comparisons.append(Comparison(model, task, dtype, implementation, *verdict))
    return comparisons


def _compare_outputs(
    ours: Arrays, theirs: Arrays, dtype: Precision, exact: Arrays | None
) -> tuple[bool, float, str]:
    matching = np.cumprod(ours["tokens"] == theirs["tokens"], axis=1)
    tokens, same = matching.size, int(matching.sum())
    largest = float(np.abs(theirs["logits"]).max())
    difference = _difference(ours, theirs) / largest
    if dtype is Precision.FLOAT32 or exact is None:
        # What different orders of summation leave in float32.
        equal = same == tokens and (dtype is not Precision.FLOAT32 or difference <= 1e-3)
    else:
        equal = _difference(ours, exact) <= 2 * _difference(theirs, exact)
    details = (
        f"{same} of {tokens} tokens equal, logits differ by {difference * largest:.1e} of "
        f"{largest:.3g}"
    )
    return bool(equal), difference, details


def _difference(one: Arrays, other: Arrays) -> float:
    return float(np.abs(one["logits"] - other["logits"]).max())


def _compare_losses(
    ours: np.ndarray, theirs: np.ndarray, dtype: Precision
) -> tuple[bool, float, str]:
    difference = float("inf")
    if len(ours) == len(theirs):
        difference = float(np.max(np.abs(ours - theirs) / np.abs(theirs)))
    spelled, other = (" ".join(f"{x:.5f}" for x in losses) for losses in (ours, theirs))
    # Orders of summation in float32, and rounded activations in bfloat16.
    equal = difference <= (1e-4 if dtype is Precision.FLOAT32 else 1e-2)  # False for NaN
    return equal, difference, f"{spelled} and {other} differ by {difference:.1e}"


NOISE = 0.15  # the fraction of all CPUs that others may use while a sample is taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One case of one implementation in one precision, from all processes.

    Attributes:
      median, fastest: seconds of one call, or per token.
      spread: slowest less fastest, over the median.
      samples: how many count.
      noisy: how many samples others disturbed. They are filtered out, unless all are noisy.
      throughput: `unit`s per second.
      bandwidth, flops: bytes/s and operations/s, of those that are needed at least.
      roofline_fraction: of the speed that the roofline measured in the same repeat allows.
      baseline, speedup: seconds of the fastest baseline in the same precision, and over ours.
      numbers: medians of what else was found out.
      equal: whether outputs were compared and are the same; None if they were not compared.
    """

    model: str
    task: Task
    case: str
    implementation: Implementation
    dtype: Precision
    unit: str = ""
    median: float | None = None
    fastest: float | None = None
    spread: float | None = None
    samples: int = 0
    noisy: int = 0
    throughput: float | None = None
    bandwidth: float | None = None
    flops: float | None = None
    roofline_fraction: float | None = None
    baseline: float | None = None
    speedup: float | None = None
    peak_bytes: int | None = None
    compilations: int | None = None
    compile_seconds: float | None = None
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    equal: bool | None = None
    error: str | None = None


def summarize(
    results: Sequence[CaseResult], comparisons: Sequence[Comparison], *, on_cpu: bool
) -> list[Measurement]:
    """One measurement per case and implementation, in the order in which they were first run."""
    groups: dict[tuple[str, ...], list[CaseResult]] = {}
    for result in results:
        key = (result.model, result.task, result.case, result.implementation, result.dtype)
        groups.setdefault(key, []).append(result)
    measured = [_measurement(group, results, comparisons, on_cpu) for group in groups.values()]
    return [_with_baseline(one, measured) for one in measured]


def _measurement(
    group: list[CaseResult],
    results: Sequence[CaseResult],
    comparisons: Sequence[Comparison],
    on_cpu: bool,
) -> Measurement:
    first = group[0]
    numbers = collections.defaultdict(list)
    for name, number in itertools.chain.from_iterable(r.numbers.items() for r in group):
        numbers[name].append(number)
    found = Measurement(
        model=first.model,
        task=first.task,
        case=first.case,
        implementation=first.implementation,
        dtype=first.dtype,
        unit=first.unit,
        equal=_equal(first, comparisons),
        numbers={name: statistics.median(values) for name, values in numbers.items()},
        peak_bytes=max((r.peak_bytes for r in group if r.peak_bytes is not None), default=None),
        compilations=first.compilations,
        compile_seconds=first.compile_seconds,
        error=next((r.error for r in group if r.error), None),
    )
    samples = [seconds for result in group for seconds in noise_filtered(result)]
    if not samples:
        return found
    median = statistics.median(samples)
    if median <= 0:  # a difference of two times
        return dataclasses.replace(found, error="too little work to be told from noise")
    throughput = first.units / median if first.units else None
    flops, moved = sum(first.flops), sum(first.bytes)
    if first.task in TRAINING and throughput:
        found.numbers["tokens_per_second"] = throughput * found.numbers["tokens_per_example"]
        if "datasheet_flops" in found.numbers:
            found.numbers["mfu"] = flops / median / found.numbers["datasheet_flops"]
    fractions = [f for r in group if (f := _roofline_fraction(r, results, on_cpu))]
    return dataclasses.replace(
        found,
        median=median,
        fastest=min(samples),
        spread=(max(samples) - min(samples)) / median,
        samples=len(samples),
        noisy=sum(other > NOISE for result in group for other in result.other_cpu),
        throughput=throughput,
        bandwidth=moved / median if moved else None,
        flops=flops / median if flops else None,
        roofline_fraction=statistics.median(fractions) if fractions else None,
    )


def noise_filtered(result: CaseResult) -> list[float]:
    """Seconds of the samples during which little else ran; of all, if something always did."""
    others = result.other_cpu or (0.0,) * len(result.seconds)
    kept = [s for s, other in zip(result.seconds, others, strict=True) if other <= NOISE]
    return kept or list(result.seconds)


def _roofline_fraction(
    result: CaseResult, results: Iterable[CaseResult], on_cpu: bool
) -> float | None:
    """By the roofline of the same process, else of the same repeat, else of any time.

    Memory bandwidth changes with what the neighbors of a machine do.
    """
    samples, rooflines = noise_filtered(result), [r for r in results if "read" in r.numbers]
    if not samples or not result.flops or not rooflines:
        return None

    def distance(other: CaseResult) -> tuple[bool, ...]:
        names = ("model", "repeat", "dtype")
        return tuple(getattr(other, name) != getattr(result, name) for name in names)

    nearest = min(rooflines, key=distance).numbers
    # Decoding only reads. A GPU reads no faster than it copies; a CPU copies faster.
    bandwidth = nearest["read"] if on_cpu else max(nearest["read"], nearest["copy"])
    limit = Roofline(bandwidth, nearest[result.dtype.floats.value])
    parts = [Work(f, b) for f, b in zip(result.flops, result.bytes, strict=True)]
    median = statistics.median(samples)
    return limit.seconds(*parts) / median if median > 0 else None


def _with_baseline(one: Measurement, measured: Sequence[Measurement]) -> Measurement:
    if one.implementation in BASELINES or one.median is None:
        return one
    about = (one.model, one.task, one.case, one.dtype)
    baselines = [
        other.median
        for other in measured
        if other.implementation in BASELINES
        and (other.model, other.task, other.case, other.dtype) == about
        and other.median is not None
    ]
    if not baselines:
        return one
    fastest = min(baselines)
    return dataclasses.replace(one, baseline=fastest, speedup=fastest / one.median)


def _equal(result: CaseResult, comparisons: Sequence[Comparison]) -> bool | None:
    about = [
        comparison.equal
        for comparison in comparisons
        if (comparison.model, comparison.task, comparison.dtype)
        == (result.model, result.task, result.dtype)
        and result.implementation in (Implementation.OURS, comparison.implementation)
    ]
    return all(about) if about else None
