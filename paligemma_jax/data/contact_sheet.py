"""Many samples on one picture: what the model will be shown, and what it is to answer."""

import re
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

from paligemma_jax.data.record import Record
from paligemma_jax.errors import PaliGemmaError
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.image_source import load_image
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.parsing import parse_answer
from paligemma_jax.processing.segmentations import Segmentations
from paligemma_jax.viz.boxes import draw
from paligemma_jax.viz.drawing import drawable, load_font

_SIDE, _GAP, _FONT, _LINE, _LINES = 320, 8, 13, 16, 6  # pixels, and lines of text
_COLUMNS = 4
_BOX = re.compile(r"(<loc\d{4}>){4}")
_MASK = re.compile(r"(<seg\d{3}>){16}")


def contact_sheet(records: Sequence[Record], codec: MaskCodec | None = None) -> Image.Image:
    """Pictures with boxes, and with masks if there is a codec, over prompt, answer and name."""
    cells = [_cell(record, codec) for record in records]
    columns = max(1, min(_COLUMNS, len(cells)))
    width, height = _SIDE + _GAP, _SIDE + _LINES * _LINE + 2 * _GAP
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        sheet.paste(cell, (_GAP + column * width, _GAP + row * height))
    return sheet


def target_text(suffix: str) -> str:
    """An answer with [box] and [mask] for its tokens."""
    return _MASK.sub("[mask] ", _BOX.sub("[box] ", suffix)).replace("  ", " ").strip()


def _cell(record: Record, codec: MaskCodec | None) -> Image.Image:
    cell = Image.new("RGB", (_SIDE, _SIDE + _LINES * _LINE + _GAP), "white")
    pictures = [load_image(image) for image in record.images]
    # Several pictures of one prompt share the room.
    for place, picture in enumerate(pictures):
        room = _SIDE // len(pictures)
        scale = min(room / picture.width, _SIDE / picture.height)
        size = max(1, round(scale * picture.width)), max(1, round(scale * picture.height))
        small = picture.resize(size)
        cell.paste(_drawn(small, record.suffix, codec) if not place else small, (place * room, 0))
    pen, font = ImageDraw.Draw(cell), load_font(_FONT)
    lines = [
        *textwrap.wrap(record.prefix, 46)[:2],
        *textwrap.wrap(f"-> {target_text(record.suffix) or '(nothing)'}", 46)[: _LINES - 3],
    ]
    for place, line in enumerate(lines):
        pen.text((0, _SIDE + 4 + place * _LINE), drawable(font, line), fill="black", font=font)
    below = (0, _SIDE + 4 + len(lines) * _LINE)
    pen.text(below, drawable(font, record.id[-46:]), fill="gray", font=font)
    return cell


def _drawn(picture: Image.Image, suffix: str, codec: MaskCodec | None) -> Image.Image:
    answer = parse_answer(suffix)
    if not answer.objects:
        return picture
    try:
        if codec is not None and any(thing.codes for thing in answer.objects):
            found = Segmentations.decoded(answer, *picture.size, codec.decode)
        else:
            found = Detections.from_answer(answer, *picture.size)
        return draw(picture, found)
    except PaliGemmaError:  # an answer that is wrong is in the report; the picture shows the rest
        return picture
