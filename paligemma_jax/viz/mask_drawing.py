"""Attention masks laid out for a picture or an SVG."""

from collections.abc import Iterator, Sequence

import numpy as np

from paligemma_jax.viz.drawing import Drawing, Number, Rect, Words, em_width
from paligemma_jax.viz.mask_cells import KINDS, Cell, Kind, MaskToken, fold, shares
from paligemma_jax.viz.token_labels import cut

# Three of Okabe and Ito (jfly.uni-koeln.de/color) and dark grey: told apart by colour-blind people,
# tests say by how much. Blue, green and orange differ in lightness too.
COLOURS: dict[Kind, str] = {
    "image": "#0072B2",
    "prompt": "#E69F00",
    "answer": "#009E73",
    "padding": "#444444",
}
UNSEEN = "#EEEEEE"
_PALE: dict[Kind, str] = {  # half way to UNSEEN
    "image": "#77B0D0",
    "prompt": "#EAC777",
    "answer": "#77C7B0",
    "padding": "#999999",
}
TITLE = "Attention mask: the token of a row sees the coloured columns"
_UNIT, _GAP, _BAR, _EDGE = 22, 1, 7, 16
_LABEL, _FONT, _LINE = 14, 12, 20  # columns of the longest label; pixels
_SIDE_BY_SIDE = 700  # width in pixels up to which two panels stand beside each other


def mask_drawing(
    tokens: Sequence[MaskToken], masks: Sequence[np.ndarray], layers: Sequence[str], most: int
) -> Drawing:
    """Panels of at most `most` cells a side, one for each mask bool[S, S], over a legend."""
    cells = fold(tokens, most)
    margin = _margin(cells)
    extent = margin + sum(map(_size, cells))
    beside = extent <= _SIDE_BY_SIDE
    widest = max(em_width(name, _FONT) for name in layers)
    step = int(max(extent, widest if beside else 0)) + 2 * _EDGE
    columns = len(masks) if beside else 1
    width = max(step * columns, int(em_width(TITLE, 15))) + 2 * _EDGE
    top = 2 * _LINE + _EDGE
    shapes: list[Rect | Words] = [Words(_EDGE, _EDGE + 8, TITLE, 15)]
    partly = False
    for number, (mask, name) in enumerate(zip(masks, layers, strict=True)):
        x = _EDGE + (number * step if beside else 0)
        y = top + (0 if beside else number * (extent + 2 * _LINE))
        shapes.append(Words(x, y - _LINE / 2, name, _FONT))
        seen = shares(mask, cells)
        partly |= bool(((seen > 0) & (seen < 1)).any())
        shapes += _panel(cells, seen, x, y, margin)
    bottom = top + (extent + 2 * _LINE) * (1 if beside else len(masks)) - _LINE
    kinds: list[Kind] = [kind for kind in KINDS if any(cell.kind == kind for cell in cells)]
    legend, bottom = _legend(kinds, partly, width, bottom)
    return Drawing(
        width, int(bottom) + _EDGE, (*shapes, *legend), TITLE, _description(tokens, layers)
    )


def _panel(
    cells: Sequence[Cell], seen: np.ndarray, left: Number, top: Number, margin: int
) -> Iterator[Rect | Words]:
    """Labels, a bar of each axis that says what is what, and the cells."""
    starts = (np.cumsum([0, *map(_size, cells)]) + margin).tolist()
    for cell, start in zip(cells, starts, strict=False):
        size = _size(cell) - _GAP
        x, y = left + start, top + start
        yield Rect(x, top + margin - _BAR - 3, size, _BAR, COLOURS[cell.kind])
        yield Rect(left + margin - _BAR - 3, y, _BAR, size, COLOURS[cell.kind])
        label, before = cut(cell.label, _LABEL), margin - _BAR - 8
        yield Words(left + before, y + size / 2, label, _FONT, "end")
        if em_width(label, _FONT) <= size:
            yield Words(x + size / 2, top + before - _FONT / 2, label, _FONT, "middle")
        else:
            yield Words(x + size / 2, top + before, label, _FONT, upright=True)
    for row, y in zip(range(len(cells)), starts, strict=False):
        for column, x in zip(range(len(cells)), starts, strict=False):
            looking, looked_at = cells[row], cells[column]
            share = float(seen[row, column])
            width, height = _size(looked_at) - _GAP, _size(looking) - _GAP
            sentence = _sentence(looking, looked_at, share)
            x1, y1 = left + x, top + y
            if share < 1:
                yield Rect(x1, y1, width, height, UNSEEN, sentence)
            if share > 0:
                colour = COLOURS[looked_at.kind]
                if share < 1 and looking.size > 1:
                    colour = _PALE[looked_at.kind]
                elif share < 1:
                    # A window cuts off the oldest tokens: what is left stands at the right.
                    part = min(max(2.0, width * share), width - 2.0)
                    x1, width = x1 + width - part, part
                yield Rect(x1, y1, width, height, colour, sentence)


def _legend(
    kinds: Sequence[Kind], partly: bool, width: Number, y: Number
) -> tuple[list[Rect | Words], Number]:
    """Coloured squares with words, wrapped to `width`; the place below them."""
    entries = [(kind, COLOURS[kind], 0) for kind in kinds]
    entries.append(("not seen", UNSEEN, 0))
    if partly:
        entries.append(("some of the folded tokens are seen", COLOURS["image"], 7))
    shapes: list[Rect | Words] = []
    x = _EDGE
    for text, colour, part in entries:
        needed = 24 + em_width(text, _FONT)
        if x + needed > width and x > _EDGE:
            x, y = _EDGE, y + _LINE
        shapes.append(Rect(x, y, 14, 14, UNSEEN))
        shapes.append(Rect(x + part, y, 14 - part, 14, colour))
        shapes.append(Words(x + 19, y + 7, text, _FONT))
        x += int(needed) + 12
    return shapes, y + _LINE


def _margin(cells: Sequence[Cell]) -> int:
    longest = max((em_width(cut(cell.label, _LABEL), _FONT) for cell in cells), default=0)
    return int(longest) + _BAR + 12


def _size(cell: Cell) -> int:
    """Pixels of a row or column; what stands for many tokens is larger."""
    return _UNIT * (1 if cell.size == 1 else 3 if cell.kind == "image" else 2)


def _sentence(looking: Cell, looked_at: Cell, share: float) -> str:
    verb = "sees" if share == 1 else f"sees {share:.0%} of" if share > 0 else "does not see"
    return f"{looking.kind} {looking.label} {verb} {looked_at.kind} {looked_at.label}"


def _description(tokens: Sequence[MaskToken], layers: Sequence[str]) -> str:
    counts = [f"{sum(t.kind == kind for t in tokens)} {kind}" for kind in KINDS]
    text = " ".join(token.label for token in tokens if token.kind in ("prompt", "answer"))
    return f"{', '.join(counts)} tokens. {'; '.join(layers)}. Text: {text}"
