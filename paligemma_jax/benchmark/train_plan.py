"""Which implementations train which models, at the sizes there are."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from paligemma_jax.benchmark.implementation import Kind, Precision
from paligemma_jax.benchmark.models import find_model
from paligemma_jax.benchmark.task import TRAINING, Task
from paligemma_jax.benchmark.timing import Effort
from paligemma_jax.benchmark.train_case import TrainSteps
from paligemma_jax.benchmark.train_worker import TrainJob
from paligemma_jax.errors import ConfigError

KINDS = (Kind.OURS, Kind.HUGGING_FACE)
DTYPES = (Precision.FLOAT32, Precision.BFLOAT16)
F32, BF16 = DTYPES


@dataclasses.dataclass(frozen=True)
class TrainTurn:
    """One process: an implementation that trains a model in one way, in one of the repeats."""

    model: str
    kind: Kind
    dtype: Precision
    repeat: int
    case: TrainSteps
    small: bool

    def job(self, weights: Path | None, arrays: Path) -> TrainJob:
        """What the process is told; `arrays` are for those that answer."""
        assert weights is not None, "training begins with a checkpoint"
        return TrainJob(**vars(self), weights=weights)


@dataclasses.dataclass(frozen=True)
class TrainEntry:
    """A model at a size.

    Attributes:
      dtypes: of activations and frozen weights.
      share: as of an `Entry`.
      small: measures the machine's ceilings in a moment, which is for trying.
    """

    model: str
    kinds: tuple[Kind, ...]
    dtypes: tuple[Precision, ...]
    cases: tuple[TrainSteps, ...]
    repeats: int = 3
    share: float = 1.0
    small: bool = False
    written: bool = True
    starts: int = 0

    def without(self, kinds: Sequence[Kind]) -> "TrainEntry":
        """For where some implementations are not installed."""
        left = tuple(kind for kind in self.kinds if kind not in kinds)
        return dataclasses.replace(self, kinds=left)

    def turns(self, repeat: int) -> list[TrainTurn]:
        """The processes of one repeat; every other repeat goes the other way around."""
        turns = [
            TrainTurn(self.model, kind, dtype, repeat, case, self.small)
            for dtype in self.dtypes
            for case in self.cases
            for kind in self.kinds
        ]
        return turns[::-1] if repeat % 2 else turns


def train_entries(
    size: str,
    tasks: Sequence[Task],
    *,
    models: Sequence[str] | None = None,
    kinds: Sequence[Kind] | None = None,
    dtypes: Sequence[Precision] | None = None,
    repeats: int | None = None,
    quick: bool = False,
) -> list[TrainEntry]:
    """What is trained at a size, of `tasks`; the other arguments narrow or change that.

    Raises ConfigError for names that do not exist or that nothing is trained with.
    """
    if size not in TRAIN_SIZES:
        raise ConfigError(f"There is no size {size!r}. {', '.join(TRAIN_SIZES)} fit.")
    _check(kinds, KINDS, "trained with")
    _check(dtypes, DTYPES, "trained in")
    chosen = TRAIN_SIZES[size]
    if models is not None:
        by_model = {entry.model: entry for entry in chosen}
        chosen = [by_model.get(m, dataclasses.replace(chosen[0], model=m)) for m in models]
    for entry in chosen:
        find_model(entry.model)
    changes = {
        "kinds": tuple(kinds or ()),
        "dtypes": tuple(dtypes or ()),
        "repeats": 1 if quick else repeats,
    }
    given = {name: value for name, value in changes.items() if value}
    return [
        dataclasses.replace(
            entry, cases=tuple(case for case in entry.cases if case.task in tasks), **given
        )
        for entry in chosen
    ]


def _check(names: Sequence[str] | None, known: Sequence[str], how: str) -> None:
    for name in names or ():
        if name not in known:
            raise ConfigError(
                f"Nothing is {how} {name} here. {', '.join(known)} fit. Choose one of them, or "
                "measure answering: --task answer"
            )


def _cases(batch: int, effort: Effort) -> tuple[TrainSteps, ...]:
    return tuple(TrainSteps(task, batch, effort=effort) for task in TRAINING)


_GPU = TrainEntry(
    "paligemma-3b-pt-224",
    KINDS,
    (BF16,),
    _cases(32, Effort(4, 12, 8.0)),
    repeats=2,
    share=150.0,
)
TRAIN_SIZES: dict[str, list[TrainEntry]] = {
    "tiny": [
        TrainEntry("tiny", KINDS, (F32,), _cases(2, Effort(2, 2, 0)), repeats=1, small=True),
    ],
    # Few rows: a step of so many weights takes a CPU seconds.
    "cpu": [TrainEntry("mid", KINDS, (F32,), _cases(2, Effort(2, 2)))],
    "gpu": [_GPU, dataclasses.replace(_GPU, model="paligemma2-3b-pt-224")],
}
# What a run of everything else has time for, at its end.
BESIDE_ANSWERING: dict[str, list[TrainEntry]] = {
    "gpu": [dataclasses.replace(_GPU, repeats=1)],
}
