"""Pictures -> the float32 pixels SigLIP was trained on.

A checkpoint brings its method: big_vision's were trained on bilinear resizing truncated to 8 bit,
Hugging Face's processor resizes bicubically. Both squash to a square and map [0, 255] to [-1, 1].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.image_source import ImageSource, load_image
from paligemma_jax.processing.resample import resize_bilinear_antialias


@runtime_checkable
class PixelMethod(Protocol):
    """A way from 8-bit RGB of any size to float32 [size, size, 3] in [-1, 1]."""

    name: ClassVar[str]

    def __call__(self, image: Image.Image, size: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class BilinearTruncated:
    """big_vision's `resize(size, antialias=True)|value_range(-1, 1)`, bit for bit.

    Source: google-research/big_vision, pp/ops_image.py; the resized picture is truncated to uint8.
    """

    name: ClassVar[str] = "bilinear-antialias-truncated"

    def __call__(self, image: Image.Image, size: int) -> np.ndarray:
        resized = resize_bilinear_antialias(np.asarray(image), size, size)
        pixels = np.clip(resized, 0, 255).astype(np.uint8).astype(np.float32)
        return pixels / 255 * 2 - 1


@dataclasses.dataclass(frozen=True)
class Bicubic:
    """Hugging Face's SiglipImageProcessor (PIL backend), bit for bit.

    Bicubic with antialias on 8-bit pixels, then x / 255 and (x - 0.5) / 0.5.
    """

    name: ClassVar[str] = "bicubic-pil"

    def __call__(self, image: Image.Image, size: int) -> np.ndarray:
        resized = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        unit = (resized * (1 / 255)).astype(np.float32)  # the product in float64, as there
        return (unit - np.float32(0.5)) / np.float32(0.5)


METHODS: dict[str, PixelMethod] = {m.name: m for m in (BilinearTruncated(), Bicubic())}


@dataclasses.dataclass(frozen=True)
class ImagePreprocessing:
    """Any picture -> f32[size, size, 3] in [-1, 1]; `size` in pixels, aspect ratio not kept."""

    size: int
    method: PixelMethod = BilinearTruncated()

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(
                f"Image size {self.size!r} does not fit. A positive number of pixels such as 224 "
                "does. Take it from the checkpoint: config.img.image_size"
            )

    def __call__(self, source: ImageSource, *, allow_urls: bool = False) -> np.ndarray:
        """Loads (see `load_image`) and resizes; raises InvalidImageError."""
        return self.preprocess(load_image(source, allow_urls=allow_urls))

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """f32[size, size, 3] in [-1, 1] of an RGB picture that `load_image` gave."""
        return self.method(image, self.size)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON."""
        return {"size": self.size, "method": self.method.name}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImagePreprocessing":
        """Inverse of `to_dict`; raises ConfigError for a missing field or an unknown method."""
        try:
            return cls(size=values["size"], method=METHODS[values["method"]])
        except KeyError as e:
            raise ConfigError(
                f"Image preprocessing {dict(values)} lacks or does not know {e}. A size and one of "
                f"the methods {', '.join(METHODS)} fit. Convert the checkpoint again: "
                "paligemma convert SOURCE TARGET"
            ) from e
