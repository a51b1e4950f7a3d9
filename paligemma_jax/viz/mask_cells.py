"""Many tokens as few cells: pictures, padding and the middle of long texts are folded."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

Kind = Literal["image", "prompt", "answer", "padding"]
KINDS: tuple[Kind, ...] = ("image", "prompt", "answer", "padding")
FEWEST_CELLS = 10  # three for each kind, one for padding


@dataclasses.dataclass(frozen=True)
class MaskToken:
    """One place of the sequence; `picture` counts from 1 and is 0 outside pictures."""

    kind: Kind
    label: str
    picture: int = 0


@dataclasses.dataclass(frozen=True)
class Cell:
    """Tokens start..stop-1, drawn as one row and one column."""

    kind: Kind
    label: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


def fold(tokens: Sequence[MaskToken], most: int) -> tuple[Cell, ...]:
    """Cells of `tokens`, at most `most` (or `FEWEST_CELLS` if that is more).

    A picture is one cell and so is all padding. If that is too many, the longest of pictures,
    prompt and answer is folded in its middle.
    """
    by_kind = {kind: _cells(tokens, kind) for kind in KINDS}
    room = {kind: len(cells) for kind, cells in by_kind.items()}
    while sum(room.values()) > max(most, FEWEST_CELLS):
        room[max(room, key=lambda kind: room[kind])] -= 1
    return tuple(cell for kind in KINDS for cell in _fold_middle(by_kind[kind], room[kind]))


def shares(mask: np.ndarray, cells: Sequence[Cell]) -> np.ndarray:
    """f32[cells, cells]: the share of token pairs in which row sees column; mask bool[S, S]."""
    starts = [cell.start for cell in cells]
    sizes = np.array([cell.size for cell in cells])
    if not starts:
        return np.zeros((0, 0), np.float32)
    seen = np.add.reduceat(mask, starts, axis=1, dtype=np.int32)
    seen = np.add.reduceat(seen, starts, axis=0, dtype=np.int64)
    return (seen / np.outer(sizes, sizes)).astype(np.float32)


def _cells(tokens: Sequence[MaskToken], kind: Kind) -> list[Cell]:
    """One cell for each text token, each picture, and all padding."""
    places = [i for i, token in enumerate(tokens) if token.kind == kind]
    if not places:
        return []
    if kind == "padding":
        start, stop = places[0], places[-1] + 1
        label = f"pad×{stop - start}" if stop - start > 1 else tokens[start].label
        return [Cell(kind, label, start, stop)]
    if kind != "image":
        return [Cell(kind, tokens[i].label, i, i + 1) for i in places]
    pictures = tokens[places[-1]].picture
    ends = [i + 1 for i in places if i == places[-1] or tokens[i + 1].picture > tokens[i].picture]
    starts = [places[0], *ends[:-1]]
    return [
        Cell(kind, f"img{n if pictures > 1 else ''}×{stop - start}", start, stop)
        for n, (start, stop) in enumerate(zip(starts, ends, strict=True), 1)
    ]


def _fold_middle(cells: list[Cell], room: int) -> list[Cell]:
    if len(cells) <= room:
        return cells
    before = room // 2
    after = room - before - 1
    middle = cells[before : len(cells) - after]
    start, stop = middle[0].start, middle[-1].stop
    kind = middle[0].kind
    what = f"{len(middle)} img" if kind == "image" else "…"
    folded = Cell(kind, f"{what}×{stop - start}", start, stop)
    return [*cells[:before], folded, *cells[len(cells) - after :]]
