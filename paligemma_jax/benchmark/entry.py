"""What a run consists of: entries, of which each is a model, and turns, which are processes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from paligemma_jax.benchmark.case import Case
from paligemma_jax.benchmark.cases import (
    Decode,
    DecodeMemory,
    Equality,
    FirstToken,
    MeasureCeilings,
)
from paligemma_jax.benchmark.implementation import Kind, Precision
from paligemma_jax.benchmark.worker import Job

F32 = Precision.FLOAT32
_OF_INTEGERS = (MeasureCeilings, Decode)


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
      compared: whether outputs are compared before all else; once for a model is enough.
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
    compared: bool = True

    def without(self, kinds: Sequence[Kind]) -> "Entry":
        """For where some implementations are not installed."""
        left = tuple(kind for kind in self.kinds if kind not in kinds)
        return dataclasses.replace(self, kinds=left)

    def turns(self, repeat: int) -> list[Turn]:
        """The processes of one repeat; every other repeat goes the other way around."""
        turns = [
            self._turn(kind, dtype, repeat)
            for dtype in self.dtypes
            for kind in self.kinds
            if kind is Kind.OURS or not dtype.quantized
        ]
        compared = self._compared(repeat) and Kind.HUGGING_FACE in self.kinds
        if compared and F32 not in self.dtypes:  # what less precise outputs are held against
            turns.append(Turn(self.model, Kind.HUGGING_FACE, F32, 0, (Equality(),)))
        if Kind.OURS in self.kinds:
            turns += [self._turn(Kind.OURS, dtype, repeat) for dtype in self.quantized]
        idle = (MeasureCeilings(self.small),)
        turns = [turn for turn in turns if turn.cases not in ((), idle)]
        return turns[::-1] if repeat % 2 else turns

    def _turn(self, kind: Kind, dtype: Precision, repeat: int) -> Turn:
        return Turn(self.model, kind, dtype, repeat, self._cases(kind, dtype, repeat))

    def _compared(self, repeat: int) -> bool:
        return self.written and self.compared and repeat == 0

    def _cases(self, kind: Kind, dtype: Precision, repeat: int) -> tuple[Case, ...]:
        if kind is Kind.SCANNED:
            if dtype is not F32:
                return ()
            decode = [c for c in self.each if isinstance(c, Decode) and c.batch == 1]
            return tuple(decode if repeat < 2 else ())
        first = repeat == 0
        if kind is Kind.HUGGING_FACE_COMPILED:
            return self._compiled() if first else ()
        of_first = first and dtype is (*self.dtypes, *self.quantized)[0]
        own = self.ours_once if kind is Kind.OURS and of_first else ()
        # Memory before all else: what other cases compile stays resident.
        cases: list[Case] = [case for case in own if isinstance(case, DecodeMemory)]
        cases += [Equality()] if self._compared(repeat) else []
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
