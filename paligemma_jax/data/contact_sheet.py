"""A sheet of images with the objects of an answer drawn on them, over lines of text."""

import dataclasses
import re
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from paligemma_jax.drawing import drawable, load_font
from paligemma_jax.errors import PaliGemmaError
from paligemma_jax.processing.detections import Detections, Segmentations, draw
from paligemma_jax.processing.image import ImageSource, load_image
from paligemma_jax.processing.location_tokens import parse_answer
from paligemma_jax.processing.masks import MaskCodec

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_SIDE, _GAP, _FONT, _LINE = 320, 8, 13, 16  # pixels
_LINES, _COLUMNS = 6, 4
_BOX = re.compile(r"(<loc\d{4}>){4}")
_MASK = re.compile(r"(<seg\d{3}>){16}")


@dataclasses.dataclass(frozen=True)
class Panel:
    """Images, the answer whose objects are drawn on the first, and texts with their colors."""

    images: tuple[ImageSource, ...]
    answer: str
    texts: tuple[tuple[str, str], ...]


def contact_sheet(panels: Sequence[Panel], codec: MaskCodec | None = None) -> Image.Image:
    """All panels in rows; masks are drawn if there is a codec. Tokens are shortened in texts."""
    columns = max(1, min(_COLUMNS, len(panels)))
    width, height = _SIDE + _GAP, _SIDE + _LINES * _LINE + 2 * _GAP
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        sheet.paste(_draw_panel(panel, codec), (_GAP + column * width, _GAP + row * height))
    return sheet


def _draw_panel(panel: Panel, codec: MaskCodec | None) -> Image.Image:
    cell = Image.new("RGB", (_SIDE, _SIDE + _LINES * _LINE + _GAP), "white")
    width = _SIDE // max(1, len(panel.images))  # several images of one prompt share it
    for number, image in enumerate(map(load_image, panel.images)):
        scale = min(width / image.width, _SIDE / image.height)
        small = image.resize([max(1, round(scale * side)) for side in image.size])
        target = small if number else _draw_objects(small, panel.answer, codec)
        cell.paste(target, (number * width, 0))
    pen, font = ImageDraw.Draw(cell), load_font(_FONT)
    y = _SIDE + 4
    for text, color in panel.texts:
        short = _MASK.sub("[mask] ", _BOX.sub("[box] ", text)).replace("  ", " ").strip()
        for line in _wrap(pen, drawable(font, short) or "(nothing)", font)[: _LINES // 2]:
            pen.text((0, y), line, fill=color, font=font)
            y += _LINE
    return cell


def _draw_objects(image: Image.Image, text: str, codec: MaskCodec | None) -> Image.Image:
    answer = parse_answer(text)
    if not answer.objects:
        return image
    try:
        if codec is not None and any(thing.codes for thing in answer.objects):
            found = Segmentations.decode(answer, *image.size, codec.decode)
        else:
            found = Detections.from_answer(answer, *image.size)
        return draw(image, found)
    except PaliGemmaError:  # a malformed answer; its text tells
        return image


def _wrap(pen: ImageDraw.ImageDraw, text: str, font: Font) -> list[str]:
    lines, line = [], ""
    for character in text.replace("\n", " "):
        if pen.textlength(line + character, font=font) > _SIDE:
            lines.append(line)
            line = ""
        line += character
    return [*lines, line]
