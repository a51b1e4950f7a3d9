"""Backgrounds of the demo world: muted textures on which every colour stays visible."""

import functools
import math

import numpy as np
from PIL import Image

GRAIN = 112  # noise is drawn on this grid whatever the size, so that every size shows the same


@functools.lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    ticks = (np.arange(size, dtype=np.float32) + 0.5) / size
    return ticks[:, None], ticks[None, :]


def _enlarge(field: np.ndarray, size: int, method: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(field.astype(np.float32)).resize((size, size), method))


def _ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns the coordinate along a random direction, f32[size, size], spanning about 1."""
    turn = rng.uniform(0, 2 * math.pi)
    y, x = _grid(size)
    return np.float32(math.sin(turn)) * y + np.float32(math.cos(turn)) * x


def gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    """A smooth ramp in a random direction."""
    ramp = _ramp(rng, size)
    return (ramp - ramp.min()) / (ramp.max() - ramp.min())


def clouds(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth value noise of two octaves."""
    cells = int(rng.integers(3, 8))
    coarse = _enlarge(rng.random((cells, cells)), size, Image.Resampling.BICUBIC)
    fine = _enlarge(rng.random((3 * cells, 3 * cells)), size, Image.Resampling.BILINEAR)
    return np.clip(0.7 * coarse + 0.3 * fine, 0, 1)


def stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Soft-edged stripes in a random direction."""
    wave = np.sin(_ramp(rng, size) * np.float32(2 * math.pi / rng.uniform(0.06, 0.22)))
    return np.clip(0.5 + rng.uniform(0.6, 3) * wave, 0, 1)


def checks(rng: np.random.Generator, size: int) -> np.ndarray:
    """A soft-edged chequerboard."""
    y, x = _grid(size)
    rate, shift = math.pi / rng.uniform(0.05, 0.16), rng.uniform(0, 6)
    wave = np.sin(y * np.float32(rate) + shift) * np.sin(x * np.float32(rate) + shift)
    return np.clip(0.5 + 2 * wave, 0, 1)


def speckle(rng: np.random.Generator, size: int) -> np.ndarray:
    """Scattered soft dots."""
    cells = int(rng.integers(20, 50))
    dots = (rng.random((cells, cells)) < rng.uniform(0.1, 0.3)).astype(np.float32)
    return _enlarge(dots, size, Image.Resampling.BILINEAR)


TEXTURES = (gradient, clouds, stripes, checks, speckle)


def render_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns a texture between two muted mid tones, uint8[size, size, 3]."""
    field = TEXTURES[int(rng.integers(len(TEXTURES)))](rng, size)
    tone, difference = rng.uniform(104, 150), rng.uniform(8, 26) * rng.choice((-1, 1))
    tint, other_tint = rng.uniform(-18, 18, 3), rng.uniform(-9, 9, 3)
    first = np.float32(tone - difference / 2 + tint)
    step = np.float32(difference + other_tint)
    return (first + field[..., None] * step).astype(np.uint8)


def add_noise(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Returns uint8[size, size, 3] with grain of a random strength added."""
    size = pixels.shape[0]
    strength = np.float32(rng.uniform(2, 9))
    if rng.random() < 0.5:  # grey grain
        grain = rng.standard_normal((GRAIN, GRAIN), np.float32) * strength
        if size != GRAIN:
            grain = _enlarge(grain, size, Image.Resampling.BILINEAR)
        grain = grain[..., None]
    else:  # coloured grain
        grain = rng.standard_normal((GRAIN, GRAIN, 3), np.float32) * strength
        if size != GRAIN:
            bytes_ = (np.clip(grain, -40, 40) * 3 + 128).astype(np.uint8)
            resized = Image.fromarray(bytes_).resize((size, size), Image.Resampling.BILINEAR)
            grain = (np.asarray(resized, np.float32) - 128) / 3
    noisy = pixels + grain
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)
