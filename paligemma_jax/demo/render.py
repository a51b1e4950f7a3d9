"""Draws scenes of the demo world on muted textures; a scene looks the same at every size."""

import functools
import math
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from paligemma_jax.demo.scene import PLATE_EDGE, Box, Scene, Shape, Text, ink_mask, outline

GRAIN = 112  # noise is drawn on this grid whatever the size, so that every size shows the same


@functools.lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    ticks = (np.arange(size, dtype=np.float32) + 0.5) / size
    return ticks[:, None], ticks[None, :]


def _enlarge(field: np.ndarray, size: int, method: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(field.astype(np.float32)).resize((size, size), method))


def _ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """The coordinate along a random direction, f32[size, size], spanning about 1."""
    turn = rng.uniform(0, 2 * math.pi)
    y, x = _grid(size)
    return np.float32(math.sin(turn)) * y + np.float32(math.cos(turn)) * x


def _gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    """A smooth ramp in a random direction."""
    ramp = _ramp(rng, size)
    return (ramp - ramp.min()) / (ramp.max() - ramp.min())


def _clouds(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth value noise of two octaves."""
    cells = int(rng.integers(3, 8))
    coarse = _enlarge(rng.random((cells, cells)), size, Image.Resampling.BICUBIC)
    fine = _enlarge(rng.random((3 * cells, 3 * cells)), size, Image.Resampling.BILINEAR)
    return np.clip(0.7 * coarse + 0.3 * fine, 0, 1)


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Soft-edged stripes in a random direction."""
    wave = np.sin(_ramp(rng, size) * np.float32(2 * math.pi / rng.uniform(0.06, 0.22)))
    return np.clip(0.5 + rng.uniform(0.6, 3) * wave, 0, 1)


def _checks(rng: np.random.Generator, size: int) -> np.ndarray:
    """A soft-edged chequerboard."""
    y, x = _grid(size)
    rate, shift = math.pi / rng.uniform(0.05, 0.16), rng.uniform(0, 6)
    wave = np.sin(y * np.float32(rate) + shift) * np.sin(x * np.float32(rate) + shift)
    return np.clip(0.5 + 2 * wave, 0, 1)


def _speckle(rng: np.random.Generator, size: int) -> np.ndarray:
    """Scattered soft dots."""
    cells = int(rng.integers(20, 50))
    dots = (rng.random((cells, cells)) < rng.uniform(0.1, 0.3)).astype(np.float32)
    return _enlarge(dots, size, Image.Resampling.BILINEAR)


TEXTURES = (_gradient, _clouds, _stripes, _checks, _speckle)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A texture between two muted mid tones, uint8[size, size, 3]."""
    field = TEXTURES[int(rng.integers(len(TEXTURES)))](rng, size)
    tone, difference = rng.uniform(104, 150), rng.uniform(8, 26) * rng.choice((-1, 1))
    tint, other_tint = rng.uniform(-18, 18, 3), rng.uniform(-9, 9, 3)
    first = np.float32(tone - difference / 2 + tint)
    step = np.float32(difference + other_tint)
    return (first + field[..., None] * step).astype(np.uint8)


def _add_grain(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """uint8[size, size, 3] with grain of a random strength added."""
    size = pixels.shape[0]
    strength = np.float32(rng.uniform(2, 9))
    if rng.random() < 0.5:  # gray grain
        grain = rng.standard_normal((GRAIN, GRAIN), np.float32) * strength
        if size != GRAIN:
            grain = _enlarge(grain, size, Image.Resampling.BILINEAR)
        grain = grain[..., None]
    else:  # colored grain
        grain = rng.standard_normal((GRAIN, GRAIN, 3), np.float32) * strength
        if size != GRAIN:
            bytes_ = (np.clip(grain, -40, 40) * 3 + 128).astype(np.uint8)
            resized = Image.fromarray(bytes_).resize((size, size), Image.Resampling.BILINEAR)
            grain = (np.asarray(resized, np.float32) - 128) / 3
    noisy = pixels + grain
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)


SUPERSAMPLING = 4  # masks are drawn this much larger and averaged down


def _pixel_frame(box: Box, size: int) -> tuple[int, int, int, int]:
    """The whole pixels (left, top, right, bottom) that a normalized box touches."""
    y1, x1, y2, x2 = (value * size for value in box)
    return math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)


def _shape_coverage(shape: Shape, size: int) -> tuple[Image.Image, int, int]:
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
    """bool[size, size]: the pixels that are mostly the shape's."""
    coverage, left, top = _shape_coverage(shape, size)
    mask = Image.new("L", (size, size))
    mask.paste(coverage, (left, top))
    return np.asarray(mask) >= 128


def _draw_plate(canvas: Image.Image, text: Text, color: tuple[int, int, int]) -> None:
    size, scale = canvas.width, SUPERSAMPLING // 2
    y1, x1, y2, x2 = text.box
    frame = (y1 - PLATE_EDGE, x1 - PLATE_EDGE, y2 + PLATE_EDGE, x2 + PLATE_EDGE)
    left, top, right, bottom = _pixel_frame(frame, size)
    mask = Image.new("L", ((right - left) * scale, (bottom - top) * scale))
    edges = (0, 0, mask.width - 1, mask.height - 1)
    ImageDraw.Draw(mask).rounded_rectangle(edges, 0.025 * size * scale, fill=255)
    canvas.paste(color, (left, top), mask.reduce(scale))


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
    """The image of a scene, uint8[size, size, 3] RGB, the same for the same scene."""
    return draw_image(scene.shapes, scene.texts, scene.background, size)


def draw_image(
    shapes: Iterable[Shape], texts: Iterable[Text], background: int, size: int
) -> np.ndarray:
    """uint8[size, size, 3]: shapes, then texts, on the background of a seed."""
    rng = np.random.default_rng(background)
    canvas = Image.fromarray(_background(rng, size))
    for shape in shapes:
        coverage, left, top = _shape_coverage(shape, size)
        canvas.paste(shape.rgb, (left, top), coverage)
    for text in texts:
        if text.plate is not None:
            _draw_plate(canvas, text, text.plate)
        _draw_text(canvas, text)
    return _add_grain(rng, np.asarray(canvas))
