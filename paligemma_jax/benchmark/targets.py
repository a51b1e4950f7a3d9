"""Targets: ratios within one run that this library aims at, and the verdict on each.

They are about the roofline of the machine, about Hugging Face's implementation in the same
precision, and about this library itself. What was not run is not passed.
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

from paligemma_jax.benchmark import BASELINES, Implementation, Precision, Task
from paligemma_jax.benchmark.cases import (
    Decode,
    DecodeMemory,
    FirstToken,
    LongDecode,
    MixedLengths,
    Start,
)
from paligemma_jax.benchmark.results import Measurement
from paligemma_jax.benchmark.subjects import PROXY

OURS, HUGGING_FACE = Implementation.OURS, Implementation.HUGGING_FACE
F32, BF16 = Precision.FLOAT32, Precision.BFLOAT16


class Verdict(enum.StrEnum):
    """How a target was met."""

    STRETCH = "pass, stretch too"
    PASS = "pass"
    FAIL = "FAIL"
    NOT_RUN = "not run"
    NOT_EQUAL = "does not count: outputs differ"


@dataclasses.dataclass(frozen=True)
class Judged:
    """A target, what was measured, and the verdict."""

    what: str
    model: str
    target: str
    value: float | None
    verdict: Verdict


class Measured:
    """The measurements of one model and task; what was not measured is None."""

    def __init__(self, measurements: Sequence[Measurement]):
        self._found = measurements
        self.equal = all(m.equal is not False for m in measurements)

    def find(
        self, case: str, dtype: Precision, implementation: Implementation = OURS
    ) -> Measurement | None:
        """The measurement of a case, or of the one in a unit, such as "example"."""
        for m in self._found:
            if case in (m.case, m.unit) and (m.dtype, m.implementation) == (dtype, implementation):
                return m
        return None

    def median(self, case: str, dtype: Precision, by: Implementation = OURS) -> float | None:
        """Seconds."""
        return getattr(self.find(case, dtype, by), "median", None)

    def number(self, case: str, name: str) -> float | None:
        """What a case of ours found out, in whichever precision."""
        found = [m.numbers[name] for m in self._found if m.case == case and name in m.numbers]
        return found[0] if found else None


Value = Callable[[Measured], float | None]


@dataclasses.dataclass(frozen=True)
class Target:
    """A value to reach: at least `threshold`, or at most where `at_most`; `stretch` is better.

    `models` are those it is for; None: all but "tiny".
    """

    what: str
    value: Value
    threshold: float
    stretch: float | None = None
    at_most: bool = False
    models: tuple[str, ...] | None = None
    task: Task = Task.INFERENCE

    def judge(self, machine: str, model: str, measured: Measured) -> Judged:
        """The verdict on a model."""
        value = self.value(measured)
        if value is None:
            verdict = Verdict.NOT_RUN
        elif not measured.equal:
            verdict = Verdict.NOT_EQUAL
        elif self.stretch is not None and self._reached(value, self.stretch):
            verdict = Verdict.STRETCH
        else:
            verdict = Verdict.PASS if self._reached(value, self.threshold) else Verdict.FAIL
        stretch = "" if self.stretch is None else f" ({self.stretch:g})"
        target = f"at {'most' if self.at_most else 'least'} {self.threshold:g}{stretch}"
        return Judged(f"{machine}: {self.what}", model, target, value, verdict)

    def _reached(self, value: float, threshold: float) -> bool:
        return value <= threshold if self.at_most else value >= threshold


def judge(measurements: Sequence[Measurement], *, on_cpu: bool) -> list[Judged]:
    """Every target of both kinds of machines; those of the other kind are "not run"."""
    judged = []
    for machine, targets in (("CPU", CPU), ("GPU", GPU)):
        here = measurements if on_cpu == (machine == "CPU") else ()
        for target in targets:
            by_model: dict[str, list[Measurement]] = {}
            for m in here:
                named = m.model != "tiny" if target.models is None else m.model in target.models
                if named and m.task is target.task:
                    by_model.setdefault(m.model, []).append(m)
            for model, found in (by_model or {(target.models or ("any",))[0]: []}).items():
                judged.append(target.judge(machine, model, Measured(found)))
    return judged


def _over(one: float | None, other: float | None) -> float | None:
    return None if not one or not other else one / other


def _fastest(seconds: Sequence[float | None]) -> float | None:
    return min((s for s in seconds if s), default=None)


def _roofline_fraction(case: str, dtype: Precision) -> Value:
    return lambda m: getattr(m.find(case, dtype), "roofline_fraction", None)


def _speedup(case: str, dtype: Precision, *others: Implementation) -> Value:
    """Over the fastest of `others`."""
    return lambda m: _over(
        _fastest([m.median(case, dtype, other) for other in others]), m.median(case, dtype)
    )


def _best_speedup(m: Measured) -> float | None:
    """Of our fastest precision, over bfloat16 of Hugging Face."""
    ours = _fastest([m.median(DECODE, dtype) for dtype in Precision])
    return _over(m.median(DECODE, BF16, HUGGING_FACE), ours)


def _growth(case: str, dtype: Precision) -> Value:
    return lambda m: _over(m.median(case, dtype), m.median(DECODE, dtype))


def _warm_start(m: Measured) -> float | None:
    found = (_over(m.median(WARM, dtype), m.median(COLD, dtype)) for dtype in Precision)
    return next((ratio for ratio in found if ratio), None)


def _ratio(one: tuple[str, str], other: tuple[str, str]) -> Value:
    """Of two numbers, each by the names of its case and its own."""
    return lambda m: _over(m.number(*one), m.number(*other))


def _memory(dtype: Precision) -> Value:
    """Our peak memory over Hugging Face's in training."""

    def value(m: Measured) -> float | None:
        peaks = [
            getattr(m.find(TRAIN, dtype, by), "peak_bytes", None) for by in (OURS, HUGGING_FACE)
        ]
        return _over(*peaks)

    return value


def _mfu(m: Measured) -> float | None:
    return getattr(m.find(TRAIN, BF16), "numbers", {}).get("mfu")


TRAIN = "example"
DECODE, DECODE_8, DECODE_64 = (Decode(batch).name for batch in (1, 8, 64))
FIRST, LONG, MEMORY, MIXED = (
    c.name for c in (FirstToken(1), LongDecode(), DecodeMemory(), MixedLengths())
)
COLD, WARM = (Start(warm).name for warm in (False, True))
GPU_3B = ("paligemma-3b-pt-224", "paligemma2-3b-pt-224")
_FIRST_HF = "time to first token{} against Hugging Face"
_DECODE_ROOFLINE = "decode {}, fraction of the roofline"


def _training(models: tuple[str, ...] | None, dtype: Precision) -> list[Target]:
    faster, smaller = _speedup(TRAIN, dtype, HUGGING_FACE), _memory(dtype)
    speed = "training, examples/s against Hugging Face"
    memory = "training, peak memory over Hugging Face's"
    return [
        target
        for task, name in ((Task.FULL, "full"), (Task.LORA, "LoRA"))
        for target in (
            Target(f"{name} {speed}", faster, 1.4, 2.0, False, models, task),
            Target(f"{name} {memory}", smaller, 0.6, 0.45, True, models, task),
        )
    ]


def _ours_alone(models: tuple[str, ...] | None, memory: float) -> list[Target]:
    compilations = _ratio((MIXED, "most_compilations"), (MIXED, "buckets"))
    compile_time = _ratio((WARM, "compile_seconds"), (COLD, "compile_seconds"))

    def target(what: str, value: Value, threshold: float) -> Target:
        return Target(what, value, threshold, at_most=True, models=models)

    return [
        target("decode latency, 256 new tokens over 16", lambda m: m.number(LONG, "ratio"), 1.05),
        target("compilations for 50 mixed prompts, over buckets", compilations, 1.0),
        target("warm start over cold start", _warm_start, 0.3),
        target("compile time, warm start over cold start", compile_time, 0.3),
        Target(
            "peak memory in decoding over weights and KV cache",
            lambda m: m.number(MEMORY, "ratio"), memory, at_most=True,
        ),
    ]  # fmt: skip


CPU: list[Target] = [
    Target(_DECODE_ROOFLINE.format(F32), _roofline_fraction(DECODE, F32), 0.75),
    Target("decode float32 against Hugging Face", _speedup(DECODE, F32, *BASELINES), 1.8),
    Target("decode, our best against Hugging Face bfloat16", _best_speedup, 1.0),
    Target(
        "decode float32 against big_vision-style decode",
        _speedup(DECODE, F32, Implementation.BIG_VISION_STYLE), 4.0, models=(PROXY,),
    ),
    Target(_FIRST_HF.format(", float32"), _speedup(FIRST, F32, *BASELINES), 2.0),
    Target(_FIRST_HF.format(", bfloat16"), _speedup(FIRST, BF16, *BASELINES), 0.9, 1.1),
    Target("decode step, batch 8 over batch 1", _growth(DECODE_8, F32), 1.7, at_most=True),
    *_ours_alone(None, 1.10),
    *_training(None, F32),
]  # fmt: skip


def _gpu(
    what: str, value: Value, threshold: float, stretch: float | None, *models: str, **more: Any
) -> Target:
    return Target(what, value, threshold, stretch, models=models or GPU_3B, **more)


_DECODE_BF16, _FIRST_BF16 = _roofline_fraction(DECODE, BF16), _roofline_fraction(FIRST, BF16)
_BF16_ROOFLINE = _DECODE_ROOFLINE.format(BF16)
_FIRST_ROOFLINE = "time to first token, fraction of the roofline"
_COMPILED = Implementation.HUGGING_FACE_COMPILED
GPU: list[Target] = [
    _gpu(_BF16_ROOFLINE, _DECODE_BF16, 0.65, 0.80),
    _gpu(_BF16_ROOFLINE, _DECODE_BF16, 0.78, 0.88, "paligemma2-10b-pt-224"),
    _gpu(_BF16_ROOFLINE, _DECODE_BF16, 0.88, 0.95, "paligemma2-28b-pt-224"),
    _gpu("decode against Hugging Face, eager", _speedup(DECODE, BF16, HUGGING_FACE), 8.0, 15.0),
    _gpu("decode against Hugging Face, compiled", _speedup(DECODE, BF16, _COMPILED), 1.0, 1.3),
    _gpu(_FIRST_HF.format(""), _speedup(FIRST, BF16, *BASELINES), 1.2, 1.5),
    _gpu(_FIRST_ROOFLINE, _FIRST_BF16, 0.50, 0.65, "paligemma-3b-pt-224"),
    _gpu(_FIRST_ROOFLINE, _FIRST_BF16, 0.60, 0.70, "paligemma-3b-pt-448"),
    _gpu(_FIRST_ROOFLINE, _FIRST_BF16, 0.55, 0.65, "paligemma-3b-pt-896"),
    _gpu("decode step, batch 8 over batch 1", _growth(DECODE_8, BF16), 1.15, None, at_most=True),
    _gpu("decode step, batch 64 over batch 1", _growth(DECODE_64, BF16), 1.6, None, at_most=True),
    *_ours_alone(GPU_3B, 1.03),
    *_training(GPU_3B, BF16),
    _gpu("full training, MFU", _mfu, 0.42, 0.5, task=Task.FULL),
    _gpu("LoRA training, MFU", _mfu, 0.42, 0.5, task=Task.LORA),
]
