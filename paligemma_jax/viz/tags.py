"""Words beside the boxes, at places where they hide one another and the picture least."""

import os
import unicodedata
from collections.abc import Sequence

from PIL import ImageDraw, ImageFont

from paligemma_jax.viz.palette import Colour, ink_on

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
