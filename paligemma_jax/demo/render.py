"""Draws scenes: the same scene looks the same at every size."""

import math
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from paligemma_jax.demo.background import add_noise, render_background
from paligemma_jax.demo.fonts import ink_mask
from paligemma_jax.demo.geometry import Box, outline
from paligemma_jax.demo.scene import PLATE_EDGE, Scene, Shape, Text

SUPERSAMPLING = 4  # masks are drawn this much larger and averaged down


def _pixel_frame(box: Box, size: int) -> tuple[int, int, int, int]:
    """Returns the whole pixels (left, top, right, bottom) that a normalised box touches."""
    y1, x1, y2, x2 = (value * size for value in box)
    return math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)


def shape_coverage(shape: Shape, size: int) -> tuple[Image.Image, int, int]:
    """How much of each pixel a shape covers (mode "L"), and the left and top of that part."""
    left, top, right, bottom = _pixel_frame(shape.box, size)
    scale = SUPERSAMPLING
    mask = Image.new("L", ((right - left) * scale, (bottom - top) * scale))
    draw = ImageDraw.Draw(mask)
    y1, x1, y2, x2 = (value * size * scale for value in shape.box)
    y1, x1, y2, x2 = y1 - top * scale, x1 - left * scale, y2 - top * scale, x2 - left * scale
    # Pillow fills the pixels on the far edge too, hence the half pixels.
    if shape.kind == "circle":
        draw.ellipse((x1, y1, x2 - 1, y2 - 1), fill=255)
    else:
        corners = outline(shape.kind, shape.angle, shape.style)
        side = max(y2 - y1, x2 - x1) - 1
        draw.polygon([(x1 + x * side, y1 + y * side) for y, x in corners.tolist()], fill=255)
    return mask.reduce(scale), left, top


def shape_mask(shape: Shape, size: int) -> np.ndarray:
    """Returns bool[size, size]: the pixels that are mostly the shape's."""
    coverage, left, top = shape_coverage(shape, size)
    mask = Image.new("L", (size, size))
    mask.paste(coverage, (left, top))
    return np.asarray(mask) >= 128


def _draw_shape(canvas: Image.Image, shape: Shape) -> None:
    coverage, left, top = shape_coverage(shape, canvas.width)
    canvas.paste(shape.rgb, (left, top), coverage)


def _draw_plate(canvas: Image.Image, text: Text, colour: tuple[int, int, int]) -> None:
    size, scale = canvas.width, SUPERSAMPLING // 2
    y1, x1, y2, x2 = text.box
    frame = (y1 - PLATE_EDGE, x1 - PLATE_EDGE, y2 + PLATE_EDGE, x2 + PLATE_EDGE)
    left, top, right, bottom = _pixel_frame(frame, size)
    mask = Image.new("L", ((right - left) * scale, (bottom - top) * scale))
    edges = (0, 0, mask.width - 1, mask.height - 1)
    ImageDraw.Draw(mask).rounded_rectangle(edges, 0.025 * size * scale, fill=255)
    canvas.paste(colour, (left, top), mask.reduce(scale))


def _draw_text(canvas: Image.Image, text: Text) -> None:
    size = canvas.width
    # A fixed large em, shrunk to the box: glyphs keep their form at every size.
    em = 96 if text.capital * size < 48 else 320
    ink = ink_mask(text.font, text.string, em)
    ink = ink.rotate(text.angle, Image.Resampling.BILINEAR, expand=True)
    left, top, right, bottom = _pixel_frame(text.box, size)
    y1, x1, y2, x2 = (value * size for value in text.box)
    per_x, per_y = ink.width / (x2 - x1), ink.height / (y2 - y1)
    border_x, border_y = math.ceil(per_x) + 1, math.ceil(per_y) + 1
    padded = Image.new("L", (ink.width + 2 * border_x, ink.height + 2 * border_y))
    padded.paste(ink, (border_x, border_y))
    source = (
        border_x + (left - x1) * per_x,
        border_y + (top - y1) * per_y,
        border_x + (right - x1) * per_x,
        border_y + (bottom - y1) * per_y,
    )
    mask = padded.resize((right - left, bottom - top), Image.Resampling.BOX, box=source)
    canvas.paste(text.ink, (left, top), mask)


def render(scene: Scene, size: int) -> np.ndarray:
    """Returns the picture of a scene, uint8[size, size, 3] RGB, the same for the same scene."""
    return draw_picture(scene.shapes, scene.texts, scene.background, size)


def draw_picture(
    shapes: Iterable[Shape], texts: Iterable[Text], background: int, size: int
) -> np.ndarray:
    """Returns uint8[size, size, 3]: shapes, then texts, on the background of a seed."""
    rng = np.random.default_rng(background)
    canvas = Image.fromarray(render_background(rng, size))
    for shape in shapes:
        _draw_shape(canvas, shape)
    for text in texts:
        if text.plate is not None:
            _draw_plate(canvas, text, text.plate)
        _draw_text(canvas, text)
    return add_noise(rng, np.asarray(canvas))
