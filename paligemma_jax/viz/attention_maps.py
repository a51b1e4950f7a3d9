"""Attention maps laid over images, and tokens as words.

The maps come from `generation.image_attention_maps`. They show where attention went, which is no
explanation of the answer (arXiv 1902.10186).
"""

import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from paligemma_jax.drawing import INK, Number, drawable, load_font, viridis
from paligemma_jax.errors import InvalidImageError, InvalidPromptError
from paligemma_jax.processing.tokenizer import Tokenizer

PANEL = 192  # pixels of a panel's longer side
_GAP, _FONT, _LINE, _BAR = 8, 14, 20, 12
_NARROWEST = 320  # pixels, for the words below the panels
_NOTES = (
    "%: fraction of the attention that went to the images, the rest to text.",
    "Where attention went is no explanation of the answer.",
)


def draw_attention_map(
    image: Image.Image, weights: Float[np.ndarray, "gh gw"], *, ceiling: Number | None = None
) -> Image.Image:
    """The image in gray under one map, smoothed between the centres of patches; same size.

    Colors go from 0 (violet) to `ceiling` (yellow), which is the map's maximum if None.
    """
    top = float(np.max(weights, initial=0.0)) if ceiling is None else ceiling
    values = (
        np.asarray(weights, np.float32) / top if top > 0 else np.zeros(weights.shape, np.float32)
    )
    smooth = Image.fromarray(values).resize(image.size, Image.Resampling.BILINEAR)
    strength = np.clip(np.asarray(smooth), 0, 1)
    # The image shows through where there is little to see, and less where there is much.
    gray = np.asarray(image.convert("L"), np.float32)[..., None]
    cover = 0.5 + 0.3 * strength[..., None]
    mixed = cover * viridis(strength) + (1 - cover) * gray
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def draw_attention_maps(
    images: Image.Image | Sequence[Image.Image],
    maps: Float[np.ndarray, "T N gh gw"],
    tokens: Sequence[str],
    *,
    columns: int | None = None,
    panel: int = PANEL,
    ceiling: Number | None = None,
) -> Image.Image:
    """A sheet of the images alone, then under a map for each token, and the token below.

    Args:
      images: the images that the model saw, one or N.
      maps: fractions of attention, as `image_attention_maps` gives them for a row.
      tokens: what to write under the panels; see `token_labels`.
      columns: panels side by side; None is as many as fit 1,200 pixels.
      panel: longer side of one image in pixels.
      ceiling: the fraction of one patch that is drawn yellow; None is the maximum of each panel, so
        that panels show their own places best but do not compare. float(maps.max()) makes them.

    Raises:
      InvalidImageError: if the number of images is not N.
      InvalidPromptError: if the number of words is not T.
    """
    images = [images] if isinstance(images, Image.Image) else list(images)
    _check(images, maps, tokens)
    images = [_fit(image, panel) for image in images]
    blocks = [_block(images, "the image" if len(images) == 1 else "the images")]
    for weights, token in zip(maps, tokens, strict=True):
        top = float(weights.max()) if ceiling is None else ceiling
        drawn = [
            draw_attention_map(image, one, ceiling=top)
            for image, one in zip(images, weights, strict=True)
        ]
        blocks.append(_block(drawn, f"{token}  {weights.sum():.0%}"))
    gap = _GAP if len(images) == 1 else 3 * _GAP  # what belongs together stands together
    width, height = max(block.width for block in blocks) + gap, blocks[0].height + _GAP
    across = min(columns or max(1, 1200 // width), len(blocks))
    rows = -(-len(blocks) // across)
    breadth = max(across * width - gap, _NARROWEST)
    legend = _legend(breadth, ceiling)
    sheet = Image.new(
        "RGB", (breadth + 2 * _GAP, rows * height + legend.height + 2 * _GAP), "white"
    )
    for number, block in enumerate(blocks):
        sheet.paste(block, (_GAP + number % across * width, _GAP + number // across * height))
    sheet.paste(legend, (_GAP, rows * height + _GAP))
    return sheet


def _block(images: Sequence[Image.Image], words: str) -> Image.Image:
    """Images side by side, with text below."""
    width = sum(image.width for image in images) + 2 * (len(images) - 1)
    height = max(image.height for image in images)
    block = Image.new("RGB", (width, height + _LINE), "white")
    x = 0
    for image in images:
        block.paste(image, (x, 0))
        x += image.width + 2
    _write(block, words, width / 2, height + _LINE / 2, "mm")
    return block


def _legend(width: int, ceiling: Number | None) -> Image.Image:
    """The colors from 0 to the ceiling, and what the numbers mean."""
    most = "the panel's highest patch" if ceiling is None else f"{ceiling:.1%} of the attention"
    lines = [line for note in _NOTES for line in _wrap(note, width)]
    legend = Image.new("RGB", (width, _LINE * (len(lines) + 1)), "white")
    length = min(120, width // 3)
    colors = np.broadcast_to(viridis(np.linspace(0, 1, length)), (_BAR, length, 3))
    legend.paste(Image.fromarray(np.ascontiguousarray(colors)), (14, (_LINE - _BAR) // 2))
    _write(legend, "0", 0, _LINE / 2, "lm")
    _write(legend, most, 20 + length, _LINE / 2, "lm")
    for number, line in enumerate(lines, 1):
        _write(legend, line, 0, (number + 0.5) * _LINE, "lm")
    return legend


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces."""
    font = load_font(_FONT)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _write(image: Image.Image, text: str, x: Number, y: Number, anchor: str) -> None:
    font = load_font(_FONT)
    words = drawable(font, text)
    ImageDraw.Draw(image).text((x, y), words, fill=INK, font=font, anchor=anchor)


def _fit(image: Image.Image, longest: int) -> Image.Image:
    scale = longest / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def _check(images: Sequence[Image.Image], maps: np.ndarray, tokens: Sequence[str]) -> None:
    if len(images) != maps.shape[1]:
        raise InvalidImageError(
            f"Expected the {maps.shape[1]} images of the maps, in their order, got {len(images)}."
        )
    if len(tokens) != maps.shape[0]:
        raise InvalidPromptError(
            f"Expected a label for each of {maps.shape[0]} maps, got {len(tokens)}. Make them "
            "with: token_labels(tokenizer, answer.tokens)"
        )


def token_labels(tokenizer: Tokenizer, tokens: Iterable[int]) -> tuple[str, ...]:
    """Each piece as SentencePiece spells it (a space is U+2581), newlines and the like escaped."""
    return tuple(_visible(tokenizer.piece(int(token))) for token in tokens)


def cells_wide(text: str) -> int:
    """Columns that `text` takes in a terminal: two for East Asian wide characters."""
    return sum(map(_width, text))


def cut(text: str, width: int) -> str:
    """`text`, or as much of its beginning as fits `width` columns with an ellipsis."""
    if cells_wide(text) <= width:
        return text
    kept = ""
    for character in text:
        if cells_wide(kept + character) > width - 1:
            break
        kept += character
    return f"{kept}…"


def _visible(piece: str) -> str:
    return "".join(c if _is_visible(c) else c.encode("unicode_escape").decode() for c in piece)


def _is_visible(character: str) -> bool:
    # Z: spaces and line ends; C: control, formatting (direction marks), unassigned; M: combining.
    return unicodedata.category(character)[0] not in "ZCM"


def _width(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
