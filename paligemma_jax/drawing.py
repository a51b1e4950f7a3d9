"""Colours that colour-blind people can tell apart, one a label.

Numbers as colours whose lightness rises evenly, so that colour-blind people can read them.

Words beside the boxes, at places where they hide one another and the picture least.

Masks laid over a picture: a veil of colour, and an outline that shows on any background.

Results drawn on the picture they were found in.

Rectangles and words that become an SVG or a picture, laid out once.
"""

import dataclasses
import functools
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal
from xml.sax.saxutils import escape

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont

from paligemma_jax.errors import InvalidImageError
from paligemma_jax.processing.detections import Detections, Segmentations

# Okabe and Ito's palette without black (jfly.uni-koeln.de/color).
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")

Colour = tuple[int, int, int]


def label_colours(labels: Iterable[str]) -> dict[str, Colour]:
    """A colour (red, green, blue in 0..255) for each label, in the order they come in.

    From the eighth label on colours come again; the words beside the boxes tell them apart.
    """
    names = dict.fromkeys(labels)
    return {name: _rgb(PALETTE[place % len(PALETTE)]) for place, name in enumerate(names)}


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever has the higher contrast to `colour` (WCAG 2)."""
    linear = [((v / 255 + 0.055) / 1.055) ** 2.4 if v > 10 else v / 255 / 12.92 for v in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # (luminance + 0.05) / 0.05 against 1.05 / (luminance + 0.05)
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 1.05 * 0.05 else (255, 255, 255)


def _rgb(text: str) -> Colour:
    red, green, blue = ImageColor.getrgb(text)[:3]
    return red, green, blue


# Ten points of matplotlib's "viridis" (S. van der Walt, N. Smith; CC0), equally far apart.
_VIRIDIS = (
    "#440154", "#482878", "#3E4989", "#31688E", "#26828E",
    "#1F9E89", "#35B779", "#6ECE58", "#B5DE2B", "#FDE725",
)  # fmt: skip
_POINTS = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in _VIRIDIS], np.float32)


def viridis(values: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "... 3"]:
    """RGB of values in 0..1 (others are clipped): dark violet, green, bright yellow."""
    places = np.linspace(0, 1, len(_POINTS))
    clipped = np.clip(values, 0, 1)
    channels = [np.interp(clipped, places, _POINTS[:, c]) for c in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


Area = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels

_LEAST_FONT = 9  # pixels; smaller letters cannot be read
_FONT_SHARE = 28  # of the picture's shorter side
_MOST_HIDDEN = 1 / 3  # of the picture under all tags together


class TagWriter:
    """Writes tags on one picture; each keeps clear of those before it where it can.

    `font` is a TrueType file. The built-in font has ASCII letters alone: without another, accents
    are left off and letters of other scripts become "?".
    """

    def __init__(self, draw: ImageDraw.ImageDraw, font: str | os.PathLike[str] | None = None):
        self._draw = draw
        self._width, self._height = draw.im.size
        size = max(_LEAST_FONT, round(min(draw.im.size) / _FONT_SHARE))
        self._ascii = font is None
        self._font = (
            ImageFont.load_default(size) if font is None else ImageFont.truetype(font, size)
        )
        self._margin = max(1, size // 6)
        # Of a high and a deep letter, so that all tags are of one height.
        _, self._top, _, self._bottom = draw.textbbox((0, 0), "Hg", font=self._font)
        self.areas: list[Area] = []  # of the tags written
        self._hidden = 0.0  # pixels under tags, also under those left out

    def write(self, texts: Sequence[str], box: Area, colour: Colour) -> None:
        """Writes the first of `texts` that is no wider than the picture, else the last, cut.

        The tag stands above the box, below it, or in it: where it hides least of other tags, and of
        such places at the first that is in the picture. It is left out where tags would hide more
        than a third of a very small picture; colours still tell labels apart there.
        """
        text = self._fitting([self._shown(text) for text in texts])
        width, height = self._extent(text), self._bottom - self._top + 2 * self._margin
        self._hidden += width * height
        if self._hidden > _MOST_HIDDEN * self._width * self._height and self.areas:
            return
        x1, y1, x2, y2 = box
        choices: list[tuple[float, bool, int, Area]] = []
        for x in (x1, x2 - width):
            for y in (y1 - height, y2 + 1, y1, y2 - height):
                left = float(max(0, min(x, self._width - width)))
                top = float(max(0, min(y, self._height - height)))
                area = (left, top, left + width, top + height)
                hidden = sum(_shared(area, other) for other in self.areas)
                choices.append((hidden, top != y, len(choices), area))
        area = min(choices)[-1]
        self.areas.append(area)
        self._draw.rectangle((area[0], area[1], area[2] - 1, area[3] - 1), fill=colour)
        corner = (area[0] + self._margin, area[1] + self._margin - self._top)
        self._draw.text(corner, text, fill=ink_on(colour), font=self._font)

    def _shown(self, text: str) -> str:
        if not self._ascii:
            return text
        letters = unicodedata.normalize("NFKD", text)
        bare = "".join(letter for letter in letters if not unicodedata.combining(letter))
        return bare.encode("ascii", "replace").decode()

    def _fitting(self, texts: Sequence[str]) -> str:
        for text in texts:
            if self._extent(text) <= self._width:
                return text
        for length in range(len(texts[-1]) - 1, 0, -1):
            text = texts[-1][:length].rstrip() + "..."
            if self._extent(text) <= self._width:
                return text
        return texts[-1][:1]

    def _extent(self, text: str) -> float:
        """Width of a tag in pixels."""
        return self._draw.textlength(text, font=self._font) + 2 * self._margin


def _shared(a: Area, b: Area) -> float:
    """Area in common."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


_OPACITY = 0.45


def overlay_masks(
    image: Image.Image, masks: Sequence[np.ndarray], colours: Sequence[Colour], line: int
) -> Image.Image:
    """An RGB copy of the picture with each mask bool[H, W] filled and outlined in its colour.

    `line` is the outline's width in pixels; white of a third of it stands around the outline.
    """
    pixels = np.array(image.convert("RGB"), np.float32)
    halo = max(1, line // 3)
    for mask, colour in zip(masks, colours, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not rows.size:
            continue
        part = np.s_[
            max(0, rows[0] - halo) : rows[-1] + halo + 1,
            max(0, columns[0] - halo) : columns[-1] + halo + 1,
        ]
        inside, cut = mask[part], pixels[part]
        edge = inside & ~_repeat(inside, ImageFilter.MinFilter(3), line)
        cut[inside] += _OPACITY * (np.array(colour) - cut[inside])
        cut[edge] = colour
        cut[_repeat(inside, ImageFilter.MaxFilter(3), halo) & ~inside] = 255
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def _repeat(mask: np.ndarray, step: ImageFilter.Filter, times: int) -> np.ndarray:
    picture = Image.fromarray(mask.astype(np.uint8))
    for _ in range(times):
        picture = picture.filter(step)
    return np.asarray(picture) > 0


_LINE_SHARE = 200  # of the picture's shorter side


def draw(
    image: Image.Image,
    found: Detections | Segmentations,
    *,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """A copy of the picture with masks, boxes, labels and scores, in one colour a label.

    `font` is a TrueType file for labels beyond ASCII. Raises InvalidImageError if the picture is
    not of the size that the objects were found in.
    """
    if not isinstance(found, Segmentations):
        return draw_boxes(image, found, font=font)
    _check_size(image, found)
    colours = label_colours(found.labels)
    masks = [rle.to_mask() for rle in found.rles]
    line = _line(image)
    veiled = overlay_masks(image, masks, [colours[label] for label in found.labels], line)
    return draw_boxes(veiled, found, font=font)


def draw_boxes(
    image: Image.Image, detections: Detections, *, font: str | os.PathLike[str] | None = None
) -> Image.Image:
    """`draw` without masks."""
    _check_size(image, detections)
    drawn = image.convert("RGB") if image.mode != "RGB" else image.copy()
    draw = ImageDraw.Draw(drawn)
    line = _line(image)
    halo = max(1, line // 3)
    colours = label_colours(detections.labels)
    # Small boxes over large ones, which would hide them.
    found = sorted(detections, key=lambda one: -_area(one.xyxy))
    for one in found:
        x1, y1, x2, y2 = one.xyxy
        # White around the colour keeps the outline visible on any background.
        around = (x1 - halo, y1 - halo, x2 + halo, y2 + halo)
        draw.rectangle(around, outline="white", width=line + 2 * halo)
        draw.rectangle(one.xyxy, outline=colours[one.label], width=line)
    tags = TagWriter(draw, font)
    for one in found:
        score = "" if one.score is None else f"{one.score:.2f}"
        texts = [text for text in (f"{one.label} {score}".strip(), one.label or score) if text]
        if texts:
            tags.write(texts, one.xyxy, colours[one.label])
    return drawn


def _line(image: Image.Image) -> int:
    return max(1, round(min(image.size) / _LINE_SHARE))


def _area(xyxy: tuple[float, float, float, float]) -> float:
    return (xyxy[2] - xyxy[0]) * (xyxy[3] - xyxy[1])


def _check_size(image: Image.Image, found: Detections) -> None:
    if image.size != (found.width, found.height):
        raise InvalidImageError(
            f"The picture is {image.width} x {image.height}, and the objects were found in one of "
            f"{found.width} x {found.height} pixels. The same picture fits. Open it with: "
            "load_image(...)"
        )


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
