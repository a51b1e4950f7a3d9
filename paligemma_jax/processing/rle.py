"""COCO's run lengths of a mask, written and read as pycocotools does.

Runs go down the columns, from left to right, and begin with the pixels that are not in the mask
(0 of them if the first pixel is). Compressed, each run is written in groups of five bits, lowest
first, a sixth bit saying that more follow, as the character 48 + value; from the third run on it
is the difference from the run two before. Source: cocodataset/cocoapi, common/maskApi.c.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from paligemma_jax.errors import InvalidMaskError

_OFFSET = 48
_MORE = 0x20
_SIGN = 0x10


@dataclasses.dataclass(frozen=True)
class RLE:
    """A mask of height x width pixels as run lengths; see the module."""

    height: int
    width: int
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.counts, default=0) < 0 or sum(self.counts) != self.height * self.width:
            raise InvalidMaskError(
                f"Run lengths of {sum(self.counts)} pixels in all are no mask of {self.height} x "
                f"{self.width}. Lengths from 0 up that add to {self.height * self.width} fit. "
                'Check "size", which is [height, width].'
            )

    @classmethod
    def from_mask(cls, mask: np.ndarray) -> "RLE":
        """Of a mask bool[H, W]; raises InvalidMaskError for anything else."""
        mask = check_mask(mask)
        pixels = mask.ravel(order="F")
        changes = np.flatnonzero(np.diff(pixels, prepend=False))
        counts = np.diff(changes, prepend=0, append=pixels.size)
        height, width = mask.shape
        return cls(height, width, tuple(int(count) for count in counts))

    @classmethod
    def from_coco(cls, rle: Mapping[str, Any]) -> "RLE":
        """Of {"size": [height, width], "counts": ...}, compressed (str or bytes) or a list.

        Raises InvalidMaskError for anything else.
        """
        try:
            height, width = (int(side) for side in rle["size"])
            counts = rle["counts"]
            if isinstance(counts, bytes):
                counts = counts.decode("ascii")
            runs = _decompress(counts) if isinstance(counts, str) else tuple(map(int, counts))
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise InvalidMaskError(
                f"{str(rle)[:80]} is no run-length mask. A dictionary with the keys size (height, "
                "width) and counts fits. See RLE.from_mask(mask).to_coco()"
            ) from e
        return cls(height, width, runs)

    def to_coco(self) -> dict[str, Any]:
        """Compressed, ready for JSON: {"size": [height, width], "counts": str}."""
        return {"size": [self.height, self.width], "counts": _compress(self.counts)}

    def to_coco_uncompressed(self) -> dict[str, Any]:
        """The same with the runs as a list of int."""
        return {"size": [self.height, self.width], "counts": list(self.counts)}

    def to_mask(self) -> np.ndarray:
        """The mask bool[H, W]."""
        values = np.arange(len(self.counts)) % 2 == 1
        pixels = np.repeat(values, self.counts)
        return np.ascontiguousarray(pixels.reshape(self.width, self.height).T)

    @property
    def area(self) -> int:
        """Pixels in the mask."""
        return sum(self.counts[1::2])


def check_mask(mask: np.ndarray) -> np.ndarray:
    """`mask` itself; raises InvalidMaskError unless it is bool[H, W] of at least one pixel."""
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.ndim != 2 or not mask.size:
        what = f"{mask.dtype}{list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask)
        raise InvalidMaskError(
            f"{what} is no mask. A numpy array of bool, shaped [height, width], fits. Convert it, "
            "for example: numpy.asarray(mask) > 127"
        )
    return mask


def _compress(counts: tuple[int, ...]) -> str:
    characters = []
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            group = value & 0x1F
            value >>= 5  # keeps the sign
            more = value != (-1 if group & _SIGN else 0)
            characters.append(chr(_OFFSET + group + (_MORE if more else 0)))
            if not more:
                break
    return "".join(characters)


def _decompress(text: str) -> tuple[int, ...]:
    counts: list[int] = []
    place = 0
    while place < len(text):
        value, shift, more = 0, 0, True
        while more:
            group = ord(text[place]) - _OFFSET
            if not 0 <= group < 64:
                raise ValueError(text[place])
            value |= (group & 0x1F) << shift
            shift += 5
            more = bool(group & _MORE)
            place += 1
            if not more and group & _SIGN:
                value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return tuple(counts)
