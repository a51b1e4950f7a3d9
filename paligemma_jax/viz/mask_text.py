"""Attention masks for the terminal, in Unicode blocks."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from paligemma_jax.viz.mask_cells import Cell, Kind, MaskToken, fold, shares
from paligemma_jax.viz.token_labels import cells_wide, cut

SEEN, PART, UNSEEN = "██", "▒▒", " ·"
LABEL = 12  # widest name of a row
HEIGHT = 9  # tallest name of a column; "<loc0123>" fits
_REGION = 8


def mask_text(
    tokens: Sequence[MaskToken], masks: Sequence[np.ndarray], layers: Sequence[str], width: int
) -> str:
    """Each mask bool[S, S] under the name of its layers, then a legend, in `width` columns."""
    # Regions are parted by a line each, at most four with the one at the left.
    cells = fold(tokens, (width - _REGION - LABEL - 1 - 4) // 2)
    lines: list[str] = []
    for mask, name in zip(masks, layers, strict=True):
        lines += [name, *_panel(cells, shares(mask, cells)), ""]
    legend = f"{SEEN} the token of the row sees that of the column   {UNSEEN} does not"
    if any(PART in line for line in lines):
        legend += f"   {PART} sees some of the folded"
    return "\n".join(line.rstrip() for line in [*lines, legend])


def _panel(cells: Sequence[Cell], seen: np.ndarray) -> Iterator[str]:
    label_width = max((cells_wide(cut(cell.label, LABEL)) for cell in cells), default=0)
    margin = " " * (_REGION + label_width + 1)
    height = min(HEIGHT, max((len(cell.label) for cell in cells), default=0))
    for letters in zip(*(_upright(cell.label, height) for cell in cells), strict=True):
        yield margin + _columns(cells, letters, " ")
    previous: Kind | None = None
    for cell, row in zip(cells, seen.tolist(), strict=True):
        if cell.kind != previous:
            yield margin + _columns(cells, ["──"] * len(cells), "┼")
        region = cell.kind if cell.kind != previous else ""
        previous = cell.kind
        label = cut(cell.label, LABEL)
        name = " " * (label_width - cells_wide(label)) + label
        yield f"{region:{_REGION}}{name} " + _columns(cells, map(_block, row), "│")


def _columns(cells: Sequence[Cell], parts: Sequence[str] | Iterator[str], line: str) -> str:
    """Two-column parts side by side, `line` before the first of each kind."""
    text = ""
    for (cell, part), before in zip(zip(cells, parts, strict=True), [None, *cells], strict=False):
        text += part if before is not None and before.kind == cell.kind else line + part
    return text


def _upright(label: str, height: int) -> list[str]:
    """`height` lines of two columns, the label standing on the last."""
    letters = label if len(label) <= height else f"{label[: height - 1]}…"
    padded = itertools.chain([" "] * (height - len(letters)), letters)
    return [letter + " " * (2 - cells_wide(letter)) for letter in padded]


def _block(share: float) -> str:
    return SEEN if share == 1 else PART if share > 0 else UNSEEN
