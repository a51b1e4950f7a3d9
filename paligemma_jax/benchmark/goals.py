"""What is aimed at, as ratios within one run, and whether a run got there."""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

from paligemma_jax.benchmark.implementation import PEERS, Kind, Precision
from paligemma_jax.benchmark.rows import Rows
from paligemma_jax.benchmark.run import COLD, WARM
from paligemma_jax.benchmark.summary import Row
from paligemma_jax.benchmark.task import TRAINING, Task
from paligemma_jax.benchmark.train_goals import faster, smaller, utilisation

F32, BF16 = Precision.FLOAT32, Precision.BFLOAT16
MID = "mid"
GPU_3B = ("paligemma-3b-pt-224", "paligemma2-3b-pt-224")


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


def _share(case: str, dtype: Precision) -> Callable[[Rows], float | None]:
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


def _number(case: str, name: str) -> Callable[[Rows], float | None]:
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
    (None, Goal("decode float32, share of the memory floor", _share(DECODE, F32), 0.75)),
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
    (None, Goal(_LIKE, _number(LONG, "ratio"), 1.05, at_most=True)),
    (None, Goal(_SAME, _programs, 1.0, at_most=True)),
    (None, Goal(_WARM, _start, 0.3, at_most=True)),
    (None, Goal(_WARM_PROGRAMS, _start_programs, 0.3, at_most=True)),
    (None, Goal(_PEAK, _number(MEMORY, "ratio"), 1.10, at_most=True)),
    *_training(None, F32),
]


def _first_share(model: str, target: float, stretch: float) -> Aimed:
    what = "image + prefill, share of the floor"
    return (model,), Goal(what, _share(FIRST, BF16), target, stretch)


def _decode_share(models: tuple[str, ...], target: float, stretch: float) -> Aimed:
    what = "decode bfloat16, share of the memory floor"
    return models, Goal(what, _share(DECODE, BF16), target, stretch)


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
    (GPU_3B, Goal(_LIKE, _number(LONG, "ratio"), 1.05, at_most=True)),
    (GPU_3B, Goal(_SAME, _programs, 1.0, at_most=True)),
    (GPU_3B, Goal(_WARM, _start, 0.3, at_most=True)),
    (GPU_3B, Goal(_WARM_PROGRAMS, _start_programs, 0.3, at_most=True)),
    (None, Goal(_PEAK, _number(MEMORY, "ratio"), 1.03, at_most=True)),
    *_training(GPU_3B, BF16),
    *[
        (GPU_3B, Goal(f"{what} training, MFU", utilisation(BF16), 0.42, 0.5, task=task))
        for task, what in ((Task.FULL, "full"), (Task.LORA, "LoRA"))
    ],
]
