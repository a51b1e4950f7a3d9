"""What a check of data has found, for people to read."""

import collections
import dataclasses
import math
import os
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from paligemma_jax.data.problem import Kind, Problem

_SHOWN = 10  # problems of one kind
_BINS, _BAR = 8, 30


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """One split, or one part of a mixture.

    Attributes:
      name: of the split, or what part it is; "" if there is but one.
      source: what was read.
      records: how many there are.
      opened: different pictures that were opened.
      problems: all that were found.
      labels: objects of each label, the most frequent first.
      tokens: of each readable record, i32[n]; prompt, answer, bos, newline and eos.
      length: T; a record of more than T + 1 tokens does not fit. None if not given.
    """

    name: str
    source: str
    records: int
    opened: int
    problems: tuple[Problem, ...]
    labels: Mapping[str, int]
    tokens: np.ndarray
    length: int | None

    @property
    def too_long(self) -> int:
        """Records that do not fit."""
        return 0 if self.length is None else int(np.sum(self.tokens > self.length + 1))


@dataclasses.dataclass(frozen=True)
class DatasetReport:
    """The splits, and a picture of samples with their targets drawn; `str()` is for people."""

    splits: tuple[SplitReport, ...]
    sheet: Image.Image | None = None
    sheet_path: Path | None = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Those of all splits."""
        return tuple(problem for split in self.splits for problem in split.problems)

    @property
    def fits(self) -> bool:
        """Whether training would go through all records without stopping or skipping."""
        return not any(problem.kind.stops_training for problem in self.problems)

    def count(self, kind: Kind) -> int:
        """Problems of one kind."""
        return sum(problem.kind is kind for problem in self.problems)

    def save_sheet(self, path: str | os.PathLike[str]) -> None:
        """Writes the contact sheet as a PNG; nothing if there are no samples."""
        if self.sheet is None:
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        self.sheet.save(part, "PNG")
        os.replace(part, path)

    def __str__(self) -> str:
        lines = [line for split in self.splits for line in _split_lines(split)]
        if self.sheet_path is not None and self.sheet is not None:
            lines.append(f"Samples with their targets: {self.sheet_path}")
        stopping = sum(problem.kind.stops_training for problem in self.problems)
        if stopping:
            lines.append(f"Training would stop: {stopping:,} problems of the kinds marked with *.")
        elif self.problems:
            lines.append(f"Training would run; {len(self.problems):,} things to look at.")
        else:
            lines.append("Nothing was found wrong.")
        return "\n".join(lines)


def _split_lines(split: SplitReport) -> Iterator[str]:
    yield f"{split.name + ': ' if split.name else ''}{split.source}"
    yield f"  {split.records:,} records, {split.opened:,} different pictures opened"
    if split.labels:
        shown = [f"{label or '(no label)'} {count:,}" for label, count in split.labels.items()]
        more = f", and {len(shown) - 20} other labels" if len(shown) > 20 else ""
        text = f"objects: {', '.join(shown[:20])}{more}"
        yield from textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="    ")
    if split.tokens.size:
        yield from _token_lines(split)
    kinds = collections.Counter(problem.kind for problem in split.problems)
    for kind in Kind:
        if kinds[kind]:
            yield f"  {'*' if kind.stops_training else '-'} {kinds[kind]:,} {kind.value}"
            found = [problem for problem in split.problems if problem.kind is kind]
            for problem in found[:_SHOWN]:
                # An error names its place already.
                place = "" if problem.text.startswith(problem.place) else f"{problem.place}: "
                yield f"      {place}{_one_line(problem.text)}"
            if len(found) > _SHOWN:
                yield f"      and {len(found) - _SHOWN:,} more"
    yield ""


def _token_lines(split: SplitReport) -> Iterator[str]:
    tokens = split.tokens
    yield (
        f"  tokens of prompt and answer: {tokens.min()} to {tokens.max()}, "
        f"median {math.ceil(np.median(tokens))}, 99 of 100 have at most "
        f"{math.ceil(np.percentile(tokens, 99))}"
    )
    step = max(1, math.ceil(int(tokens.max()) / _BINS))
    counts = np.bincount((tokens - 1) // step)
    for place, count in enumerate(counts):
        bar = "#" * math.ceil(_BAR * count / counts.max())
        yield f"    {place * step + 1:5} - {(place + 1) * step:5} {bar:{_BAR}} {count:,}"
    if split.length is None:
        yield f"    All fit with length={int(tokens.max()) - 1}."
    elif split.too_long:
        longest = int(tokens.max()) - 1
        yield (
            f"    {split.too_long:,} of {tokens.size:,} do not fit length={split.length}, "
            f"and would be refused or cut; all fit with length={longest}."
        )
    else:
        yield f"    All fit length={split.length}."


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 300 else flat[:297] + "..."
