"""Rectangles and words that become an SVG or a picture, laid out once."""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Iterator
from typing import Literal
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

INK = "#222222"
_FONTS = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"
Number = int | float
_ANCHORS = {"start": "l", "middle": "m", "end": "r"}
_REPLACEMENTS = {"\u2581": "_", "×": "x", "…": "..."}  # what every font has instead
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclasses.dataclass(frozen=True)
class Rect:
    """A filled rectangle in pixels; `title` is shown to who points at it in an SVG."""

    x: Number
    y: Number
    width: Number
    height: Number
    fill: str
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Words:
    """A line of text in pixels: `y` is the middle of its height; upright text reads upwards."""

    x: Number
    y: Number
    text: str
    size: int = 12
    anchor: Literal["start", "middle", "end"] = "start"
    upright: bool = False


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What to draw, in order, on white."""

    width: int
    height: int
    shapes: tuple[Rect | Words, ...]
    title: str
    description: str

    def to_svg(self) -> str:
        """A complete SVG file."""
        return "\n".join([*self._svg(), "</svg>", ""])

    def to_image(self, scale: int = 2) -> Image.Image:
        """An RGB picture of `scale` pixels for each of the drawing's."""
        image = Image.new("RGB", (self.width * scale, self.height * scale), "white")
        draw = ImageDraw.Draw(image)
        for shape in self.shapes:
            if isinstance(shape, Words):
                _write(image, draw, shape, scale)
            elif shape.width > 0 and shape.height > 0:
                x, y = round(shape.x * scale), round(shape.y * scale)
                right = round((shape.x + shape.width) * scale) - 1
                bottom = round((shape.y + shape.height) * scale) - 1
                draw.rectangle((x, y, max(x, right), max(y, bottom)), fill=shape.fill)
        return image

    def _svg(self) -> Iterator[str]:
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" role="img" aria-labelledby="title desc" '
            f'font-family="{_FONTS}">'
        )
        yield f'<title id="title">{_xml(self.title)}</title>'
        yield f'<desc id="desc">{_xml(self.description)}</desc>'
        yield f'<rect width="{self.width}" height="{self.height}" fill="white"/>'
        for shape in self.shapes:
            yield _svg_rect(shape) if isinstance(shape, Rect) else _svg_words(shape)


def em_width(text: str, size: Number) -> float:
    """Room in pixels that `text` needs in any common sans-serif font."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return size * (0.64 * len(text) + 0.4 * wide)


def drawable(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> str:
    """`text` in the characters that `font` has: without accents, or as \\uXXXX where it must be."""
    shown = ""
    for character in text:
        character = _REPLACEMENTS.get(character, character)
        if _missing(font, character):
            plain = unicodedata.normalize("NFKD", character)[0]
            fits = plain != character and not _missing(font, plain)
            character = plain if fits else character.encode("unicode_escape").decode("ascii")
        shown += character
    return shown


@functools.lru_cache(maxsize=16)
def load_font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow."""
    return ImageFont.load_default(size=pixels)


def _missing(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, character: str) -> bool:
    """Whether the font draws `character` as it draws one that no font has (private use)."""
    if character.isascii():
        return False
    return _glyph(font, character) == _glyph(font, "\ue123")


def _glyph(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, character: str) -> bytes:
    page = Image.new("L", (64, 64))
    ImageDraw.Draw(page).text((0, 0), character, fill=255, font=font)
    return page.tobytes()


def _write(image: Image.Image, draw: ImageDraw.ImageDraw, words: Words, scale: int) -> None:
    font = load_font(words.size * scale)
    text = drawable(font, words.text)
    x, y = words.x * scale, words.y * scale
    anchor = f"{_ANCHORS[words.anchor]}m"
    if not words.upright:
        draw.text((x, y), text, fill=INK, font=font, anchor=anchor)
        return
    length = int(draw.textlength(text, font=font)) + 2
    strip = Image.new("L", (length, 2 * words.size * scale))
    ImageDraw.Draw(strip).text((0, strip.height // 2), text, fill=255, font=font, anchor="lm")
    turned = strip.transpose(Image.Transpose.ROTATE_90)
    image.paste(INK, (round(x - turned.width / 2), round(y - length)), turned)


def _svg_rect(shape: Rect) -> str:
    head = (
        f'<rect x="{shape.x:g}" y="{shape.y:g}" width="{shape.width:g}" '
        f'height="{shape.height:g}" fill="{shape.fill}"'
    )
    return f"{head}><title>{_xml(shape.title)}</title></rect>" if shape.title else f"{head}/>"


def _svg_words(words: Words) -> str:
    anchor = "" if words.anchor == "start" else f' text-anchor="{words.anchor}"'
    turn = f' transform="rotate(-90 {words.x:g} {words.y:g})"' if words.upright else ""
    return (
        f'<text x="{words.x:g}" y="{words.y:g}" font-size="{words.size}" fill="{INK}" '
        f'dominant-baseline="central" xml:space="preserve"{anchor}{turn}>{_xml(words.text)}</text>'
    )


def _xml(text: str) -> str:
    """Escaped, and without what no XML file may hold."""
    return escape(_NOT_XML.sub("\ufffd", text))
