"""The attention mask of a prompt, as text, image or SVG: which token attends to which.

The masks are computed by the model's own `attention_masks`. Many tokens become few cells: images,
padding and the middle of long texts are folded.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from PIL import Image

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.drawing import Drawing, Number, Rect, Words, em_width
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.paligemma import PaliGemma, abstract_model
from paligemma_jax.processing.processor import Processor, prompt_arrays
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.viz.attention_maps import cells_wide, cut, token_labels

Kind = Literal["image", "prompt", "answer", "padding"]
KINDS: tuple[Kind, ...] = ("image", "prompt", "answer", "padding")
MIN_CELLS = 10  # three for each kind, one for padding


@dataclasses.dataclass(frozen=True)
class MaskToken:
    """One place of the sequence; `image` counts from 1 and is 0 outside images."""

    kind: Kind
    label: str
    image: int = 0


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
    """Cells of `tokens`, at most `most` (or `MIN_CELLS` if that is more).

    A image is one cell and so is all padding. If that is too many, the longest of images,
    prompt and answer is folded in its middle.
    """
    by_kind = {kind: _cells(tokens, kind) for kind in KINDS}
    count = {kind: len(cells) for kind, cells in by_kind.items()}
    while sum(count.values()) > max(most, MIN_CELLS):
        count[max(count, key=lambda kind: count[kind])] -= 1
    return tuple(cell for kind in KINDS for cell in _fold_middle(by_kind[kind], count[kind]))


def visible_fractions(mask: np.ndarray, cells: Sequence[Cell]) -> np.ndarray:
    """f32[cells, cells]: of all token pairs, in how many row attends to column; mask bool[S, S]."""
    starts = [cell.start for cell in cells]
    sizes = np.array([cell.size for cell in cells])
    if not starts:
        return np.zeros((0, 0), np.float32)
    seen = np.add.reduceat(mask, starts, axis=1, dtype=np.int32)
    seen = np.add.reduceat(seen, starts, axis=0, dtype=np.int64)
    return (seen / np.outer(sizes, sizes)).astype(np.float32)


def _cells(tokens: Sequence[MaskToken], kind: Kind) -> list[Cell]:
    """One cell for each text token, each image, and all padding."""
    places = [i for i, token in enumerate(tokens) if token.kind == kind]
    if not places:
        return []
    if kind == "padding":
        start, stop = places[0], places[-1] + 1
        label = f"pad×{stop - start}" if stop - start > 1 else tokens[start].label
        return [Cell(kind, label, start, stop)]
    if kind != "image":
        return [Cell(kind, tokens[i].label, i, i + 1) for i in places]
    images = tokens[places[-1]].image
    ends = [i + 1 for i in places if i == places[-1] or tokens[i + 1].image > tokens[i].image]
    starts = [places[0], *ends[:-1]]
    return [
        Cell(kind, f"img{n if images > 1 else ''}×{stop - start}", start, stop)
        for n, (start, stop) in enumerate(zip(starts, ends, strict=True), 1)
    ]


def _fold_middle(cells: list[Cell], count: int) -> list[Cell]:
    if len(cells) <= count:
        return cells
    before = count // 2
    after = count - before - 1
    middle = cells[before : len(cells) - after]
    start, stop = middle[0].start, middle[-1].stop
    kind = middle[0].kind
    what = f"{len(middle)} img" if kind == "image" else "…"
    folded = Cell(kind, f"{what}×{stop - start}", start, stop)
    return [*cells[:before], folded, *cells[len(cells) - after :]]


# Three of Okabe and Ito (jfly.uni-koeln.de/color) and dark grey: told apart by color-blind people,
# tests say by how much. Blue, green and orange differ in lightness too.
COLORS: dict[Kind, str] = {
    "image": "#0072B2",
    "prompt": "#E69F00",
    "answer": "#009E73",
    "padding": "#444444",
}
UNSEEN_COLOR = "#EEEEEE"
_PALE: dict[Kind, str] = {  # half way to UNSEEN
    "image": "#77B0D0",
    "prompt": "#EAC777",
    "answer": "#77C7B0",
    "padding": "#999999",
}
TITLE = "Attention mask: the token of a row attends to the colored columns"
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
        seen = visible_fractions(mask, cells)
        partly |= bool(((seen > 0) & (seen < 1)).any())
        shapes += _draw_panel(cells, seen, x, y, margin)
    bottom = top + (extent + 2 * _LINE) * (1 if beside else len(masks)) - _LINE
    kinds: list[Kind] = [kind for kind in KINDS if any(cell.kind == kind for cell in cells)]
    legend, bottom = _legend(kinds, partly, width, bottom)
    return Drawing(
        width, int(bottom) + _EDGE, (*shapes, *legend), TITLE, _description(tokens, layers)
    )


def _draw_panel(
    cells: Sequence[Cell], seen: np.ndarray, left: Number, top: Number, margin: int
) -> Iterator[Rect | Words]:
    """Labels, a bar of each axis that says what is what, and the cells."""
    starts = (np.cumsum([0, *map(_size, cells)]) + margin).tolist()
    for cell, start in zip(cells, starts, strict=False):
        size = _size(cell) - _GAP
        x, y = left + start, top + start
        yield Rect(x, top + margin - _BAR - 3, size, _BAR, COLORS[cell.kind])
        yield Rect(left + margin - _BAR - 3, y, _BAR, size, COLORS[cell.kind])
        label, before = cut(cell.label, _LABEL), margin - _BAR - 8
        yield Words(left + before, y + size / 2, label, _FONT, "end")
        if em_width(label, _FONT) <= size:
            yield Words(x + size / 2, top + before - _FONT / 2, label, _FONT, "middle")
        else:
            yield Words(x + size / 2, top + before, label, _FONT, upright=True)
    for row, y in zip(range(len(cells)), starts, strict=False):
        for column, x in zip(range(len(cells)), starts, strict=False):
            looking, attended = cells[row], cells[column]
            fraction = float(seen[row, column])
            width, height = _size(attended) - _GAP, _size(looking) - _GAP
            sentence = _sentence(looking, attended, fraction)
            x1, y1 = left + x, top + y
            if fraction < 1:
                yield Rect(x1, y1, width, height, UNSEEN_COLOR, sentence)
            if fraction > 0:
                color = COLORS[attended.kind]
                if fraction < 1 and looking.size > 1:
                    color = _PALE[attended.kind]
                elif fraction < 1:
                    # A window cuts off the oldest tokens: what is left stands at the right.
                    part = min(max(2.0, width * fraction), width - 2.0)
                    x1, width = x1 + width - part, part
                yield Rect(x1, y1, width, height, color, sentence)


def _legend(
    kinds: Sequence[Kind], partly: bool, width: Number, y: Number
) -> tuple[list[Rect | Words], Number]:
    """Colored squares with words, wrapped to `width`; the place below them."""
    entries = [(kind, COLORS[kind], 0) for kind in kinds]
    entries.append(("not attended to", UNSEEN_COLOR, 0))
    if partly:
        entries.append(("some of the folded tokens are seen", COLORS["image"], 7))
    shapes: list[Rect | Words] = []
    x = _EDGE
    for text, color, part in entries:
        needed = 24 + em_width(text, _FONT)
        if x + needed > width and x > _EDGE:
            x, y = _EDGE, y + _LINE
        shapes.append(Rect(x, y, 14, 14, UNSEEN_COLOR))
        shapes.append(Rect(x + part, y, 14 - part, 14, color))
        shapes.append(Words(x + 19, y + 7, text, _FONT))
        x += int(needed) + 12
    return shapes, y + _LINE


def _margin(cells: Sequence[Cell]) -> int:
    longest = max((em_width(cut(cell.label, _LABEL), _FONT) for cell in cells), default=0)
    return int(longest) + _BAR + 12


def _size(cell: Cell) -> int:
    """Pixels of a row or column; what stands for many tokens is larger."""
    return _UNIT * (1 if cell.size == 1 else 3 if cell.kind == "image" else 2)


def _sentence(row: Cell, column: Cell, fraction: float) -> str:
    verb = "attends to" if fraction > 0 else "does not attend to"
    part = f" {fraction:.0%} of" if 0 < fraction < 1 else ""
    return f"{row.kind} {row.label} {verb}{part} {column.kind} {column.label}"


def _description(tokens: Sequence[MaskToken], layers: Sequence[str]) -> str:
    counts = [f"{sum(t.kind == kind for t in tokens)} {kind}" for kind in KINDS]
    text = " ".join(token.label for token in tokens if token.kind in ("prompt", "answer"))
    return f"{', '.join(counts)} tokens. {'; '.join(layers)}. Text: {text}"


_SEEN, _PART, _UNSEEN = "██", "▒▒", " ·"
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
        lines += [name, *_text_panel(cells, visible_fractions(mask, cells)), ""]
    legend = f"{_SEEN} the token of the row attends to that of the column   {_UNSEEN} does not"
    if any(_PART in line for line in lines):
        legend += f"   {_PART} attends to some of the folded"
    return "\n".join(line.rstrip() for line in [*lines, legend])


def _text_panel(cells: Sequence[Cell], seen: np.ndarray) -> Iterator[str]:
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


def _block(fraction: float) -> str:
    return _SEEN if fraction == 1 else _PART if fraction > 0 else _UNSEEN


WIDTH = 100  # columns of a terminal
MAX_CELLS = 48


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMaskView:
    """The masks of one sequence; `print` shows them.

    Attributes:
      tokens: every place of the sequence: images, prompt, answer, padding.
      masks: one bool[S, S] for each kind of layer; row i sees column j where [i, j] is True.
      layers: which layers each mask belongs to, in words.
    """

    tokens: tuple[MaskToken, ...]
    masks: tuple[np.ndarray, ...]
    layers: tuple[str, ...]

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int = WIDTH) -> str:
        """Blocks for a terminal of `width` columns; what does not fit is folded."""
        return mask_text(self.tokens, self.masks, self.layers, width)

    def to_image(self, max_cells: int = MAX_CELLS) -> Image.Image:
        """An RGB image; sequences of more than `max_cells` cells are folded.

        Characters that its font lacks are written without their accent or as \\uXXXX; the SVG has
        them.
        """
        return mask_drawing(self.tokens, self.masks, self.layers, max_cells).to_image()

    def to_svg(self, max_cells: int = MAX_CELLS) -> str:
        """An SVG with title and description, and a sentence on every cell for who points at it."""
        return mask_drawing(self.tokens, self.masks, self.layers, max_cells).to_svg()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a .svg, a .txt, or a image by its ending; raises ConfigError, OSError."""
        path = Path(path)
        ending = path.suffix.lower()
        if ending in (".svg", ".txt"):
            text = self.to_svg() if ending == ".svg" else f"{self.to_text()}\n"
            path.write_text(text, encoding="utf-8")
        elif ending in Image.registered_extensions():
            self.to_image().save(path)
        else:
            raise ConfigError(
                f"Expected a file name that ends in .png, .svg or .txt, got {str(path)!r}."
            )


def attention_mask(
    config: PaliGemmaConfig,
    processor: Processor,
    prompt: str,
    answer: str | None = None,
    *,
    images: int = 1,
    length: int | None = None,
) -> AttentionMaskView:
    """The mask of a prompt about some images, without any weights.

    Args:
      config: the architecture; `llm.sliding_window` decides about local layers.
      processor: tokenizer and encoding.
      prompt: as the model gets it, such as "detect cat".
      answer: None for the prompt alone (what inference begins with); text for the layout of
        training: prompt, answer, eos.
      images: number of images.
      length: text tokens to pad to; None is no padding.

    Raises:
      InvalidPromptError: for text that does not fit `length`.
      ConfigError: for a negative number of images.
    """
    ids = processor.prompt_ids(prompt)
    more: list[int] = []
    if answer is not None:
        more = [*processor.tokenizer.encode(answer), processor.tokenizer.eos_id]
    arrays = prompt_arrays(ids, more, len(ids) + len(more) if length is None else length)
    text = (arrays["text"], arrays["mask_ar"], arrays["mask_input"].astype(bool))
    return _view(config, processor.tokenizer, *text, images)


def _view(
    config: PaliGemmaConfig,
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    mask_ar: np.ndarray,
    mask_input: np.ndarray,
    images: int,
) -> AttentionMaskView:
    """tokens, mask_ar i32[T] and mask_input bool[T] of the text behind `images` images."""
    if images < 0:
        raise ConfigError(f"Expected 0 images or more, got {images}.")
    before = (images * config.img.num_patches, 0)
    valid = np.pad(mask_input, before, constant_values=True)
    masks = _model(config).attention_masks(
        jnp.asarray(np.pad(mask_ar, before))[None], jnp.asarray(valid)[None]
    )
    answered = np.where(np.cumsum(mask_ar) > 0, "answer", "prompt")
    kinds = np.where(mask_input, answered, "padding")
    labels = token_labels(tokenizer, tokens.tolist())
    sequence = [
        MaskToken("image", f"img{n}", n)
        for n in range(1, images + 1)
        for _ in range(config.img.num_patches)
    ]
    sequence += [MaskToken(kind, label) for kind, label in zip(kinds.tolist(), labels, strict=True)]
    drawn = [np.asarray(mask[0]) for mask in masks]
    window = config.llm.sliding_window
    if len(drawn) == 1:
        names = ["Every layer"]
    elif (drawn[0] == drawn[1]).all():
        drawn, names = drawn[:1], [f"Every layer (the window of {window:,} is longer than this)"]
    else:
        names = [
            f"Even layers: an answer token attends to the last {window:,} tokens, itself included",
            "Odd layers: the whole sequence",
        ]
    return AttentionMaskView(tuple(sequence), tuple(drawn), tuple(names))


@functools.lru_cache(maxsize=8)
def _model(config: PaliGemmaConfig) -> PaliGemma:
    """A model without weights: masks need its architecture only."""
    return abstract_model(config)
