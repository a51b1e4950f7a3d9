"""What each image patch of a scene shows: dense targets that teach the encoder to see.

The published encoders come pretrained (SigLIP on web images); ours starts from nothing, so while it
trains a linear probe on its patch features names the kind, colour, box and character under each
patch. The probe is not part of the model.
"""

import math
from collections.abc import Iterable

import numpy as np

from paligemma_jax.demo.fonts import ink_shape, load_font
from paligemma_jax.demo.scene import COLOURS, KINDS, Shape, Text

COLOUR_NAMES = tuple(COLOURS)
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
# Class 0 is "nothing" in each; the last kind is a text.
NUM_KINDS, NUM_COLOURS, NUM_CHARACTERS = len(KINDS) + 2, len(COLOURS) + 1, len(CHARACTERS) + 1
_EM = 128


def patch_targets(
    shapes: Iterable[Shape], texts: Iterable[Text], side: int
) -> dict[str, np.ndarray]:
    """Classes i32[P] `kind`, `colour`, `character`, and `box` f32[P, 4] (y1, x1, y2, x2 in 0..1).

    A patch belongs to the object whose box holds its centre; P = side * side, row by row.
    """
    middle = (np.arange(side) + 0.5) / side
    y, x = np.repeat(middle, side), np.tile(middle, side)
    kind, colour, character = (np.zeros(side * side, np.int32) for _ in range(3))
    box = np.zeros((side * side, 4), np.float32)
    for shape in shapes:
        patches = _inside(y, x, shape.box)
        kind[patches] = 1 + KINDS.index(shape.kind)
        colour[patches] = 1 + COLOUR_NAMES.index(shape.colour)
        box[patches] = shape.box
    for text in texts:
        patches = _inside(y, x, text.box)
        kind[patches] = NUM_KINDS - 1
        box[patches] = text.box
        for letter, cy, cx, width in glyphs(text):
            tall = text.capital
            cell = (cy - tall / 2, cx - width / 2, cy + tall / 2, cx + width / 2)
            character[_inside(y, x, cell)] = 1 + CHARACTERS.index(letter)
    return {"kind": kind, "colour": colour, "character": character, "box": box}


def glyphs(text: Text) -> list[tuple[str, float, float, float]]:
    """Each character with the centre (y, x) and the width of its cell, normalised."""
    font = load_font(text.font, _EM)
    capital = _EM * _capital_share(text.font)
    left = font.getbbox(text.string)[0]
    width = ink_shape(text.font, text.string)[0]
    y1, x1, y2, x2 = text.box
    angle = math.radians(text.angle)
    result = []
    for i, letter in enumerate(text.string):
        start, end = font.getlength(text.string[:i]), font.getlength(text.string[: i + 1])
        offset = (((start + end) / 2 - left) / capital - width / 2) * text.capital
        cy = (y1 + y2) / 2 - offset * math.sin(angle)
        cx = (x1 + x2) / 2 + offset * math.cos(angle)
        result.append((letter, cy, cx, (end - start) / capital * text.capital))
    return result


def _capital_share(font: str) -> float:
    """Height of a capital letter over the em."""
    _, top, _, bottom = load_font(font, _EM).getbbox("H")
    return (bottom - top) / _EM


def _inside(y: np.ndarray, x: np.ndarray, box: tuple[float, ...]) -> np.ndarray:
    """Patches with their centre in the box; the nearest one if there is none."""
    y1, x1, y2, x2 = box
    hit = (y >= y1) & (y <= y2) & (x >= x1) & (x <= x2)
    if not hit.any():
        hit[np.argmin((y - (y1 + y2) / 2) ** 2 + (x - (x1 + x2) / 2) ** 2)] = True
    return hit
