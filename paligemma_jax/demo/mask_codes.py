"""The codes of every shape's mask, looked up: encoding each anew would hold up training."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from paligemma_jax.demo.codec_data import codec_crop
from paligemma_jax.demo.geometry import box_around, extent
from paligemma_jax.demo.scene import KINDS, Shape
from paligemma_jax.processing.mask_codec import MaskCodec

_ANGLES = np.arange(-24, 25) / 2  # degrees
_STYLES = np.arange(11) / 10
_SIDE = 0.9  # of the picture that a mask is drawn in
_Key = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class MaskCodes:
    """Codes by kind, angle to half a degree, and style to a tenth: what a 64 x 64 crop shows."""

    table: Mapping[_Key, tuple[int, ...]]

    def of(self, shape: Shape) -> tuple[int, ...]:
        """The sixteen codes of a shape."""
        return self.table[_key(shape.kind, shape.angle, shape.style)]


def build_mask_codes(codec: MaskCodec) -> MaskCodes:
    """Draws and encodes a mask of every entry."""
    crops: dict[_Key, np.ndarray] = {}
    for kind in KINDS:
        for angle in _ANGLES.tolist():
            for style in _STYLES.tolist():
                key = _key(kind, angle, style)
                if key not in crops:
                    height, width = (side * _SIDE for side in extent(kind, angle, style))
                    box = box_around(0.5, 0.5, height, width)
                    shape = Shape(kind=kind, colour="black", box=box, angle=angle, style=style)
                    crops[key] = codec_crop(shape)
    codes = codec.encode(np.stack(list(crops.values())))
    return MaskCodes(dict(zip(crops, map(tuple, codes.tolist()), strict=True)))


def _key(kind: str, angle: float, style: float) -> _Key:
    turned = 0 if kind == "circle" else round(2 * angle)
    fat = round(10 * style) if kind in ("star", "cross") else 0
    return kind, turned, fat
