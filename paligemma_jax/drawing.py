"""Drawing: boxes, labels and masks on images; rectangles and words as SVG or image.

Plain arrays in; colors are those that color-blind people can tell apart.
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

# Okabe and Ito's palette without black (jfly.uni-koeln.de/color).
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")

Color = tuple[int, int, int]


def label_colors(labels: Iterable[str]) -> dict[str, Color]:
    """A color (red, green, blue in 0..255) for each label, in the order they come in.

    From the eighth label on colors come again; the words beside the boxes tell them apart.
    """
    names = dict.fromkeys(labels)
    return {name: _rgb(PALETTE[place % len(PALETTE)]) for place, name in enumerate(names)}


def ink_on(color: Color) -> Color:
    """Black or white, whichever has the higher contrast to `color` (WCAG 2)."""
    linear = [((v / 255 + 0.055) / 1.055) ** 2.4 if v > 10 else v / 255 / 12.92 for v in color]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # (luminance + 0.05) / 0.05 against 1.05 / (luminance + 0.05)
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 1.05 * 0.05 else (255, 255, 255)


def _rgb(text: str) -> Color:
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

_MIN_FONT = 9  # pixels; smaller letters cannot be read
_FONT_FRACTION = 28  # of the image's shorter side
_MAX_HIDDEN = 1 / 3  # of the image under all tags together


class TagWriter:
    """Writes tags on one image; each keeps clear of those before it where it can.

    `font` is a TrueType file. The built-in font has ASCII letters alone: without another, accents
    are left off and letters of other scripts become "?".
    """

    def __init__(self, draw: ImageDraw.ImageDraw, font: str | os.PathLike[str] | None = None):
        self._draw = draw
        self._width, self._height = draw.im.size
        size = max(_MIN_FONT, round(min(draw.im.size) / _FONT_FRACTION))
        self._ascii = font is None
        self._font = (
            ImageFont.load_default(size) if font is None else ImageFont.truetype(font, size)
        )
        self._margin = max(1, size // 6)
        # Of a high and a deep letter, so that all tags are of one height.
        _, self._top, _, self._bottom = draw.textbbox((0, 0), "Hg", font=self._font)
        self.areas: list[Area] = []  # of the tags written
        self._hidden = 0.0  # pixels under tags, also under those left out

    def write(self, texts: Sequence[str], box: Area, color: Color) -> None:
        """Writes the first of `texts` that is no wider than the image, else the last, cut.

        The tag stands above the box, below it, or in it: where it hides least of other tags, and of
        such places at the first that is in the image. It is left out where tags would hide more
        than a third of a very small image; colors still tell labels apart there.
        """
        text = self._fitting([self._shown(text) for text in texts])
        width, height = self._extent(text), self._bottom - self._top + 2 * self._margin
        self._hidden += width * height
        if self._hidden > _MAX_HIDDEN * self._width * self._height and self.areas:
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
        self._draw.rectangle((area[0], area[1], area[2] - 1, area[3] - 1), fill=color)
        corner = (area[0] + self._margin, area[1] + self._margin - self._top)
        self._draw.text(corner, text, fill=ink_on(color), font=self._font)

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
_LINE_FRACTION = 200  # of the image's shorter side


def overlay_masks(
    image: Image.Image, masks: Sequence[np.ndarray], colors: Sequence[Color], line: int
) -> Image.Image:
    """An RGB copy of the image with each mask bool[H, W] filled and outlined in its color.

    `line` is the outline's width in pixels; white of a third of it stands around the outline.
    """
    pixels = np.array(image.convert("RGB"), np.float32)
    halo = max(1, line // 3)
    for mask, color in zip(masks, colors, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not rows.size:
            continue
        part = np.s_[
            max(0, rows[0] - halo) : rows[-1] + halo + 1,
            max(0, columns[0] - halo) : columns[-1] + halo + 1,
        ]
        inside, cut = mask[part], pixels[part]
        edge = inside & ~_repeat(inside, ImageFilter.MinFilter(3), line)
        cut[inside] += _OPACITY * (np.array(color) - cut[inside])
        cut[edge] = color
        cut[_repeat(inside, ImageFilter.MaxFilter(3), halo) & ~inside] = 255
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def _repeat(mask: np.ndarray, step: ImageFilter.Filter, times: int) -> np.ndarray:
    """The mask dilated or eroded by so many pixels."""
    image = Image.fromarray(mask.astype(np.uint8))
    for _ in range(times):
        image = image.filter(step)
    return np.asarray(image) > 0


def draw_objects(
    image: Image.Image,
    xyxy: Float[np.ndarray, "n 4"],
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
    masks: Sequence[np.ndarray] | None = None,
    *,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """A copy of the image with boxes, labels, scores and masks, in one color a label.

    Args:
      image: of any mode; the copy is RGB.
      xyxy: corners x1, y1, x2, y2 in pixels.
      labels: one a box; "" draws none.
      scores: one a box, or None.
      masks: bool[H, W] of each box, or None.
      font: a TrueType file for labels beyond ASCII.
    """
    colors = label_colors(labels)
    line = max(1, round(min(image.size) / _LINE_FRACTION))
    halo = max(1, line // 3)
    drawn = image.convert("RGB") if image.mode != "RGB" else image.copy()
    if masks is not None:
        drawn = overlay_masks(drawn, masks, [colors[label] for label in labels], line)
    draw = ImageDraw.Draw(drawn)
    boxes: list[Area] = [(float(a), float(b), float(c), float(d)) for a, b, c, d in xyxy]
    # Small boxes over large ones, which would hide them.
    order = sorted(range(len(boxes)), key=lambda i: -_shared(boxes[i], boxes[i]))
    for i in order:
        x1, y1, x2, y2 = boxes[i]
        # White around the color keeps the outline visible on any background.
        around = (x1 - halo, y1 - halo, x2 + halo, y2 + halo)
        draw.rectangle(around, outline="white", width=line + 2 * halo)
        draw.rectangle(boxes[i], outline=colors[labels[i]], width=line)
    tags = TagWriter(draw, font)
    for i in order:
        score = "" if scores is None else f"{scores[i]:.2f}"
        texts = [text for text in (f"{labels[i]} {score}".strip(), labels[i] or score) if text]
        if texts:
            tags.write(texts, boxes[i], colors[labels[i]])
    return drawn


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
        """An RGB image of `scale` pixels for each of the drawing's."""
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
