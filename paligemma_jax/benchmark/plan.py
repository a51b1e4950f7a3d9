"""What a benchmark consists of: suites of cases for each model and size, as runs of processes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paligemma_jax.benchmark import SIZES, TRAINING, Implementation, Precision, Task
from paligemma_jax.benchmark.cases import (
    Case,
    Decode,
    DecodeMemory,
    EncodeImages,
    FirstToken,
    LongDecode,
    MeasureRoofline,
    MixedLengths,
    Outputs,
    TrainSteps,
)
from paligemma_jax.benchmark.measure import Effort
from paligemma_jax.benchmark.subjects import PROXY, find_model
from paligemma_jax.errors import ConfigError

OURS, BIG_VISION_STYLE = Implementation.OURS, Implementation.BIG_VISION_STYLE
HUGGING_FACE = Implementation.HUGGING_FACE
COMPILED = Implementation.HUGGING_FACE_COMPILED
F32, BF16 = Precision.FLOAT32, Precision.BFLOAT16
INTEGERS = (Precision.INT8, Precision.INT4)
_replace = dataclasses.replace


@dataclasses.dataclass(frozen=True)
class Run:
    """What one process measures: an implementation of a model, in one of the repeats."""

    model: str
    implementation: Implementation
    dtype: Precision
    repeat: int
    cases: tuple[Case, ...]

    @property
    def task(self) -> Task:
        """What the model is loaded for."""
        return self.cases[-1].task

    @property
    def load(self) -> str:
        """The name of the result of loading."""
        return "load" if self.task is Task.INFERENCE else f"load for {self.cases[-1].name}"

    @property
    def title(self) -> str:
        """For progress and errors; the same in every repeat."""
        return f"{self.model} {self.implementation} {self.dtype} {self.task}"


@dataclasses.dataclass(frozen=True)
class Job:
    """A run and its files.

    Attributes:
      weights: a Hugging Face directory; None: this library makes random weights on the device.
      outputs: the file for what is compared.
      spawned: when the process was started, as of `time.time`.
    """

    run: Run
    weights: Path | None
    outputs: Path
    spawned: float = 0.0


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is measured of a model at a size, either inference or training.

    Attributes:
      dtypes: precisions of every implementation that can run them.
      cases: of every repeat; those of training have a process each.
      once: more cases, of the first repeat only.
      ours_once: those that only this library is measured with, in its first precision.
      quantized: precisions that only this library decodes in.
      checkpoint: whether weights go through a checkpoint, so that baselines can have the same.
      starts: how many repeats end with a cold and a warm start.
      small: measures the roofline in a moment, to try it.
      seconds: what it should take: the suites that are left divide the time that is left by this.
      compared: whether outputs are compared before all else; once per model is enough.
    """

    model: str
    implementations: tuple[Implementation, ...]
    dtypes: tuple[Precision, ...]
    cases: tuple[Case, ...]
    once: tuple[Case, ...] = ()
    ours_once: tuple[Case, ...] = ()
    quantized: tuple[Precision, ...] = ()
    checkpoint: bool = True
    repeats: int = 3
    starts: int = 1
    small: bool = False
    seconds: float = 1.0
    compared: bool = True

    def without(self, implementations: Sequence[Implementation]) -> "Suite":
        """For machines where some implementations are not installed."""
        left = tuple(i for i in self.implementations if i not in implementations)
        return _replace(self, implementations=left)

    def runs(self, repeat: int) -> list[Run]:
        """The processes of one repeat; every other repeat goes the other way around."""
        if self.cases and self.cases[0].task in TRAINING:
            runs = self._training_runs(repeat)
        else:
            runs = self._inference_runs(repeat)
        return runs[::-1] if repeat % 2 else runs

    def _training_runs(self, repeat: int) -> list[Run]:
        roofline = (MeasureRoofline(self.small),)
        return [
            Run(self.model, i, dtype, repeat, (*(roofline if i is OURS else ()), case))
            for dtype in self.dtypes
            for case in self.cases
            for i in self.implementations
        ]

    def _inference_runs(self, repeat: int) -> list[Run]:
        planned = [
            (i, dtype)
            for dtype in self.dtypes
            for i in self.implementations
            if i is OURS or not dtype.quantized
        ]
        if OURS in self.implementations:
            planned += [(OURS, dtype) for dtype in self.quantized]
        compared = self.checkpoint and self.compared and repeat == 0
        runs = [
            Run(self.model, i, dtype, repeat, tuple(cases))
            for i, dtype in planned
            if (cases := self._cases(i, dtype, repeat, compared))
        ]
        if compared and HUGGING_FACE in self.implementations and F32 not in self.dtypes:
            # The reference for outputs of lower precision.
            runs.append(Run(self.model, HUGGING_FACE, F32, 0, (Outputs(),)))
        return runs

    def _cases(
        self, implementation: Implementation, dtype: Precision, repeat: int, compared: bool
    ) -> Sequence[Case]:
        if implementation is BIG_VISION_STYLE:
            if dtype is not F32 or repeat > 1:
                return []
            return [c for c in self.cases if isinstance(c, Decode) and c.batch == 1]
        if implementation is COMPILED:  # once and one sequence: each shape compiles for a minute
            one = [c for c in self.cases if isinstance(c, Decode | FirstToken) and c.batch == 1]
            return [Outputs(), *one] if repeat == 0 else []
        cases = [*self.cases, *(self.once if repeat == 0 else ())]
        first: list[Case] = [Outputs()] if compared else []
        if implementation is OURS and repeat == 0 and dtype is (*self.dtypes, *self.quantized)[0]:
            # Memory before all else: what other cases compile stays resident.
            first = [c for c in self.ours_once if isinstance(c, DecodeMemory)] + first
            cases += [c for c in self.ours_once if c not in (*cases, *first)]
        cases = first + cases
        if dtype in self.quantized:
            cases = [c for c in cases if isinstance(c, Decode)]
        if cases and implementation is OURS:
            cases = [MeasureRoofline(self.small), *cases]
        return cases


_TRIAL = Effort(2, 2, 0)
_ALL = (OURS, BIG_VISION_STYLE, HUGGING_FACE)
_TINY = Suite(
    "tiny", _ALL, (F32,), (Decode(1, 32, _TRIAL), EncodeImages(1, _TRIAL), FirstToken(1, _TRIAL)),
    ours_once=(LongDecode(1, 4, 16, _TRIAL), MixedLengths(), DecodeMemory()), repeats=1, small=True,
)  # fmt: skip
_ONCE, _TWICE = Effort(1, 1, 0), Effort(2, 2)
_CPU = Suite(
    PROXY, _ALL, (F32, BF16),
    (Decode(1, 32, Effort(3, 3)), FirstToken(1), EncodeImages(1, Effort(seconds=2))),
    once=(FirstToken(8, _ONCE), Decode(8, 32, _TWICE), EncodeImages(8, _TWICE)),
    ours_once=(LongDecode(), MixedLengths(), DecodeMemory(32)), quantized=(Precision.INT8,),
)  # fmt: skip

# On GPUs compiling takes longest, so there are few shapes, and memory is that of the same programs.
# What matters most comes first, since the time may be up before the end.
_3B, _3B_OF_2, _28B = "paligemma-3b-pt-224", "paligemma2-3b-pt-224", "paligemma2-28b-pt-224"
_FIRST = Suite(
    _3B, (OURS, HUGGING_FACE), (BF16,), (Decode(1), FirstToken(1), EncodeImages(1)),
    ours_once=(DecodeMemory(64),), repeats=1, starts=0, seconds=100,
)  # fmt: skip
_MORE = _replace(
    _FIRST, cases=(Decode(8), FirstToken(8), EncodeImages(8)),
    ours_once=(Decode(64), EncodeImages(32), LongDecode(), MixedLengths()), starts=1,
    compared=False,
)  # fmt: skip
_LARGE = Suite(
    "paligemma2-10b-pt-224", (OURS,), (BF16,), (Decode(1), FirstToken(1), Decode(8), FirstToken(8)),
    ours_once=(DecodeMemory(64), Decode(64)), checkpoint=False, repeats=1, starts=0, seconds=60,
)  # fmt: skip
_QUANTIZED = _replace(
    _LARGE, model=_3B, dtypes=(), quantized=INTEGERS, cases=(Decode(1), Decode(8)), ours_once=()
)
_HIGH_RESOLUTION = _replace(
    _LARGE, cases=(FirstToken(1), FirstToken(8), Decode(1)), ours_once=(), seconds=40
)
_COMPILED = _replace(
    _FIRST, implementations=(COMPILED,), cases=(Decode(1), FirstToken(1)), ours_once=(),
    compared=False,
)  # fmt: skip
_GPU = [
    _FIRST,
    _replace(_FIRST, model=_3B_OF_2),
    _LARGE,
    _replace(_LARGE, model=_28B, seconds=90),
    _COMPILED,
    _replace(_HIGH_RESOLUTION, model="paligemma-3b-pt-448"),
    _replace(_HIGH_RESOLUTION, model="paligemma-3b-pt-896"),
    _QUANTIZED,
    _replace(_QUANTIZED, model=_28B, cases=(Decode(1),)),
    _MORE,
    _replace(_MORE, model=_3B_OF_2, ours_once=(Decode(64), EncodeImages(32)), starts=0),
]


def _training(model: str, dtype: Precision, batch: int, effort: Effort, **about: Any) -> Suite:
    cases = tuple(TrainSteps(lora, batch, effort=effort) for lora in (False, True))
    return Suite(model, (OURS, HUGGING_FACE), (dtype,), cases, starts=0, **about)


_TRAIN_GPU = _training(_3B, BF16, 32, Effort(4, 12, 8.0), repeats=2, seconds=150.0)
INFERENCE_SIZES = {"tiny": [_TINY], "cpu": [_CPU], "gpu": _GPU}
TRAINING_SIZES = {
    "tiny": [_training("tiny", F32, 2, _TRIAL, repeats=1, small=True)],
    "cpu": [_training(PROXY, F32, 2, _TWICE)],  # a step of so many weights takes seconds
    "gpu": [_TRAIN_GPU, _replace(_TRAIN_GPU, model=_3B_OF_2)],
}
# What a run of everything else has time for at its end.
AFTER_INFERENCE = {"gpu": [_replace(_TRAIN_GPU, repeats=1)]}


def plan(
    size: str,
    tasks: Sequence[Task] | None = None,
    *,
    models: Sequence[str] | None = None,
    implementations: Sequence[Implementation] | None = None,
    dtypes: Sequence[Precision] | None = None,
    repeats: int | None = None,
    quick: bool = False,
) -> list[Suite]:
    """The suites of a size; the other arguments narrow or change them.

    A model or an implementation that a size does not have is measured as its first one is; `dtypes`
    replace those of a suite. Raises ConfigError for unknown names, and for what cannot be trained.
    """
    if size not in SIZES:
        raise ConfigError(f"expected a size of {', '.join(SIZES)}, got {size!r}")
    narrowed = any((models, implementations, dtypes, repeats, quick))
    groups: list[list[Suite]] = []
    if tasks is None or Task.INFERENCE in tasks:
        groups.append(INFERENCE_SIZES[size])
    if tasks is None and not narrowed:
        groups.append(AFTER_INFERENCE.get(size, []))
    if trained := [task for task in TRAINING if task in (tasks or ())]:
        _check_trainable(implementations, (OURS, HUGGING_FACE))
        _check_trainable(dtypes, (F32, BF16))
        groups.append(
            [
                _replace(suite, cases=tuple(c for c in suite.cases if c.task in trained))
                for suite in TRAINING_SIZES[size]
            ]
        )
    planned: list[Suite] = []
    for suites in groups:
        suites = _of_models(suites, models)
        if implementations:
            suites = _of_implementations(suites, implementations)
        if dtypes:  # instead of its own, in the suites that do more than decode with integers
            given = {"dtypes": tuple(dtypes), "quantized": ()}
            suites = [_replace(suite, **given) for suite in suites if suite.dtypes]
        if repeats:
            suites = [_replace(suite, repeats=repeats) for suite in suites]
        planned += _quick(suites) if quick else suites
    return planned


def _check_trainable(names: Sequence[str] | None, known: Sequence[str]) -> None:
    for name in names or ():
        if name not in known:
            raise ConfigError(
                f"expected {' or '.join(known)} for training, got {name}. "
                "Or measure inference: paligemma bench --task inference"
            )


def _quick(suites: Sequence[Suite]) -> list[Suite]:
    """One repeat of each model's first suite, which has what matters most."""
    first: dict[str, Suite] = {}
    for suite in suites:
        first.setdefault(suite.model, suite)
    return [
        _replace(
            suite.without([BIG_VISION_STYLE]),
            repeats=1,
            starts=0,
            once=(),
            ours_once=tuple(case for case in suite.ours_once if isinstance(case, DecodeMemory)),
        )
        for suite in first.values()
    ]


def _of_models(suites: Sequence[Suite], models: Sequence[str] | None) -> list[Suite]:
    """The suites of these models; one without any gets those of the first model."""
    chosen: list[Suite] = []
    for model in models or ():
        own = [suite for suite in suites if suite.model == model]
        like = [suite for suite in suites if suite.model == suites[0].model]
        chosen += own or [_replace(suite, model=model) for suite in like]
    for suite in chosen:
        find_model(suite.model)
    return [*suites] if models is None else chosen


def _of_implementations(
    suites: Sequence[Suite], implementations: Sequence[Implementation]
) -> list[Suite]:
    """Of each suite its own; those that a model has nowhere go into its first suite."""
    known = {(suite.model, i) for suite in suites for i in suite.implementations}
    narrowed: list[Suite] = []
    seen: set[str] = set()
    for suite in suites:
        own = tuple(
            i
            for i in implementations
            if i in suite.implementations
            or (suite.model not in seen and (suite.model, i) not in known)
        )
        seen.add(suite.model)
        if own:
            narrowed.append(_replace(suite, implementations=own))
    return narrowed
