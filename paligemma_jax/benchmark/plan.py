"""Which implementations measure which cases of which models, at the sizes there are."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from paligemma_jax.benchmark.case import Case
from paligemma_jax.benchmark.cases import (
    Decode,
    DecodeMemory,
    EncodeImages,
    Equality,
    FirstToken,
    LongAnswer,
    MeasureCeilings,
    MixedLengths,
)
from paligemma_jax.benchmark.implementation import PEERS, Kind, Precision
from paligemma_jax.benchmark.models import find_model
from paligemma_jax.benchmark.timing import Effort
from paligemma_jax.benchmark.worker import Job
from paligemma_jax.errors import ConfigError

F32, BF16 = Precision.FLOAT32, Precision.BFLOAT16
ONCE = Effort(1, 1, 0)
_OF_INTEGERS = (Equality, MeasureCeilings, Decode)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One process: an implementation of a model in a precision, in one of the repeats."""

    model: str
    kind: Kind
    dtype: Precision
    repeat: int
    cases: tuple[Case, ...]

    def job(self, weights: Path | None, arrays: Path) -> Job:
        """What the process is told."""
        return Job(**vars(self), weights=weights, arrays=arrays)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model at a size.

    Attributes:
      quantized: precisions of integers that only this library decodes in, batch by batch.
      written: weights go through a checkpoint, so that the peers can have the same.
      once: cases of the first repeat only, ours and the peers'.
      each: cases of every repeat.
      share: of the time that is left, beside those of the entries after it.
      ours_once: cases that only this library is asked, in the first repeat, in the first precision.
    """

    model: str
    kinds: tuple[Kind, ...]
    dtypes: tuple[Precision, ...]
    each: tuple[Case, ...]
    once: tuple[Case, ...] = ()
    ours_once: tuple[Case, ...] = ()
    quantized: tuple[Precision, ...] = ()
    written: bool = True
    repeats: int = 3
    starts: int = 1
    small: bool = False
    share: float = 1.0

    def without(self, kinds: Sequence[Kind]) -> "Entry":
        """For where some implementations are not installed."""
        left = tuple(kind for kind in self.kinds if kind not in kinds)
        return dataclasses.replace(self, kinds=left)

    def turns(self, repeat: int) -> list[Turn]:
        """The processes of one repeat; every other repeat goes the other way around."""
        turns = [
            Turn(self.model, kind, dtype, repeat, self._cases(kind, dtype, repeat))
            for dtype in (*self.dtypes, *self.quantized)
            for kind in self.kinds
            if kind is Kind.OURS or not dtype.quantized
            if kind is not Kind.SCANNED or dtype is F32
        ]
        turns = [turn for turn in turns if turn.cases]
        compared = self.written and Kind.HUGGING_FACE in self.kinds and repeat == 0
        if compared and F32 not in self.dtypes:  # what less precise outputs are held against
            turns.append(Turn(self.model, Kind.HUGGING_FACE, F32, 0, (Equality(),)))
        return turns[::-1] if repeat % 2 else turns

    def _cases(self, kind: Kind, dtype: Precision, repeat: int) -> tuple[Case, ...]:
        if kind is Kind.SCANNED:
            decode = [c for c in self.each if isinstance(c, Decode) and c.batch == 1]
            return tuple(decode if repeat < 2 else ())
        first = repeat == 0
        if kind is Kind.HUGGING_FACE_COMPILED:
            return self._compiled() if first else ()
        own = list(self.ours_once) if kind is Kind.OURS and dtype is self.dtypes[0] else []
        own = own if first else []
        # Memory before all else: what other cases compile stays resident.
        cases: list[Case] = [case for case in own if isinstance(case, DecodeMemory)]
        cases += [Equality()] if first and self.written else []
        if kind is Kind.OURS:
            cases.append(MeasureCeilings(self.small))
        cases += self.each
        if first:
            cases += self.once
        cases += [case for case in own if case not in cases]
        if dtype in self.quantized:
            cases = [case for case in cases if isinstance(case, _OF_INTEGERS)]
        return tuple(cases)

    def _compiled(self) -> tuple[Case, ...]:
        """Once and of one prompt: torch.compile takes a minute for every new shape."""
        cases = [case for case in self.each if isinstance(case, Decode | FirstToken)]
        return (Equality(), *(case for case in cases if case.batch == 1))


def entries(
    size: str,
    *,
    models: Sequence[str] | None = None,
    kinds: Sequence[Kind] | None = None,
    dtypes: Sequence[Precision] | None = None,
    repeats: int | None = None,
    quick: bool = False,
) -> list[Entry]:
    """What is measured at a size; the other arguments narrow or change that.

    Raises ConfigError for names that do not exist.
    """
    if size not in SIZES:
        raise ConfigError(f"There is no size {size!r}. {', '.join(SIZES)} fit.")
    chosen = SIZES[size]
    if models is not None:
        by_model = {entry.model: entry for entry in chosen}
        first = chosen[0]
        chosen = [by_model.get(m, dataclasses.replace(first, model=m)) for m in models]
    changes = {"kinds": kinds, "dtypes": dtypes, "repeats": repeats}
    if dtypes:
        chosen = [dataclasses.replace(entry, quantized=()) for entry in chosen]
    given = {k: tuple(v) if isinstance(v, Sequence) else v for k, v in changes.items() if v}
    chosen = [dataclasses.replace(entry, **given) for entry in chosen]
    for entry in chosen:
        find_model(entry.model)
    return [_quick(entry) for entry in chosen] if quick else chosen


def _quick(entry: Entry) -> Entry:
    """One repeat of what matters most."""
    kinds = tuple(kind for kind in entry.kinds if kind is not Kind.SCANNED)
    return dataclasses.replace(
        entry, kinds=kinds, repeats=1, starts=0, once=(), ours_once=(DecodeMemory(),)
    )


_TRIAL = Effort(2, 2, 0)
_TINY = Entry(
    "tiny",
    (Kind.OURS, Kind.SCANNED, Kind.HUGGING_FACE),
    (F32,),
    each=(Decode(1, 32, _TRIAL), EncodeImages(1, _TRIAL), FirstToken(1, _TRIAL)),
    ours_once=(LongAnswer(4, 16, _TRIAL), MixedLengths(), DecodeMemory()),
    repeats=1,
    small=True,
)
_CPU = Entry(
    "mid",
    (Kind.OURS, Kind.SCANNED, Kind.HUGGING_FACE),
    (F32, BF16),
    quantized=(Precision.INT8,),
    each=(Decode(1, 32, Effort(3, 3)), FirstToken(1), EncodeImages(1, Effort(seconds=2))),
    once=(FirstToken(8, ONCE), Decode(8, 32, Effort(2, 2)), EncodeImages(8, Effort(2, 2))),
    ours_once=(LongAnswer(), MixedLengths(), DecodeMemory()),
)
# Few shapes: on GPUs compiling takes longest.
_GPU_1 = (Decode(1), FirstToken(1))
_GPU_8 = (Decode(8), FirstToken(8))
_GPU_64 = Decode(64)
_GPU_3B = Entry(
    "paligemma-3b-pt-224",
    (Kind.OURS, *PEERS),
    (BF16,),
    quantized=(Precision.INT8, Precision.INT4),
    each=(*_GPU_1, EncodeImages(1)),
    once=(*_GPU_8, EncodeImages(8)),
    ours_once=(_GPU_64, EncodeImages(32), DecodeMemory(), LongAnswer(), MixedLengths()),
    repeats=2,
    share=5.0,
)
_GPU_OURS = Entry(
    "paligemma2-10b-pt-224",
    (Kind.OURS,),
    (BF16,),
    each=(*_GPU_1, *_GPU_8),
    ours_once=(DecodeMemory(), _GPU_64),
    written=False,
    repeats=1,
    starts=0,
)
SIZES: dict[str, list[Entry]] = {
    "tiny": [_TINY],
    "cpu": [_CPU],
    "gpu": [
        _GPU_3B,
        dataclasses.replace(
            _GPU_3B,
            model="paligemma2-3b-pt-224",
            ours_once=(_GPU_64, EncodeImages(32), DecodeMemory()),
            starts=0,
            share=3.0,
        ),
        _GPU_OURS,
        dataclasses.replace(_GPU_OURS, model="paligemma2-28b-pt-224", share=1.5),
        dataclasses.replace(
            _GPU_OURS, model="paligemma-3b-pt-448", each=(FirstToken(1), FirstToken(8))
        ),
        dataclasses.replace(_GPU_OURS, model="paligemma-3b-pt-896"),
    ],
}
