"""Ways to resize a picture that were drawn at random in PaliGemma's pretraining.

They are those of `tf.image.resize`: the kernel is centred on each output pixel, is stretched when
shrinking with antialias, and its weights add to one at the edges too.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Kernel(Protocol):
    """Weights by distance (in pixels of the coarser picture), none beyond `radius`."""

    @property
    def radius(self) -> float: ...

    def __call__(self, distance: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Triangle:
    """Bilinear."""

    radius: float = 1.0

    def __call__(self, distance: np.ndarray) -> np.ndarray:
        return np.maximum(0, 1 - np.abs(distance))


@dataclasses.dataclass(frozen=True)
class Area:
    """The mean of the pixels under the output pixel, each by the part of it that is under it."""

    radius: float = 1.0

    def __call__(self, distance: np.ndarray) -> np.ndarray:
        return (np.abs(distance) < 0.5).astype(float)


@dataclasses.dataclass(frozen=True)
class Cubic:
    """Piecewise cubic with B, C of Mitchell and Netravali: 0, 1/2 is Keys' (a = -1/2)."""

    b: float = 0.0
    c: float = 0.5
    radius: float = 2.0

    def __call__(self, distance: np.ndarray) -> np.ndarray:
        x, b, c = np.abs(distance), self.b, self.c
        near = (12 - 9 * b - 6 * c) * x**3 + (-18 + 12 * b + 6 * c) * x**2 + (6 - 2 * b)
        far = (-b - 6 * c) * x**3 + (6 * b + 30 * c) * x**2 + (-12 * b - 48 * c) * x
        far += 8 * b + 24 * c
        return np.where(x < 1, near, np.where(x < 2, far, 0)) / 6


@dataclasses.dataclass(frozen=True)
class Lanczos:
    """A sinc under the first lobe of a wider one."""

    radius: float = 3.0

    def __call__(self, distance: np.ndarray) -> np.ndarray:
        inside = np.abs(distance) < self.radius
        return np.where(inside, np.sinc(distance) * np.sinc(distance / self.radius), 0)


MITCHELL = Cubic(1 / 3, 1 / 3)


def resize(pixels: np.ndarray, size: int, kernel: Kernel, antialias: bool) -> np.ndarray:
    """uint8[size, size, C] of uint8[H, W, C]; clipped and truncated, as big_vision does."""
    height, width, channels = pixels.shape
    rows = weights(height, size, kernel, antialias) @ pixels.reshape(height, -1).astype(np.float32)
    columns = weights(width, size, kernel, antialias)
    both = np.einsum("xw,ywc->yxc", columns, rows.reshape(size, width, channels), optimize=True)
    # float32 sums of weights that add to one may stay just below the whole number.
    return np.clip(both + 1e-3, 0, 255).astype(np.uint8)


def weights(source: int, target: int, kernel: Kernel, antialias: bool) -> np.ndarray:
    """f32[target, source]: what each pixel of a line counts for each of the resized line."""
    scale = source / target
    centre = (np.arange(target)[:, None] + 0.5) * scale
    if isinstance(kernel, Area):  # the overlap is exact: a sampled box would be all or nothing
        low = np.maximum(centre - scale / 2, np.arange(source))
        high = np.minimum(centre + scale / 2, np.arange(source) + 1)
        found = np.maximum(0, high - low)
    else:
        stretch = max(scale, 1.0) if antialias else 1.0
        found = kernel((np.arange(source) + 0.5 - centre) / stretch)
    return (found / found.sum(axis=1, keepdims=True)).astype(np.float32)
