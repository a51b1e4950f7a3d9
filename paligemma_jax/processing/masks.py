"""Masks: run lengths, polygons, and the crops and codes of the mask codec.

Boxes are corners y1, x1, y2, x2 as fractions of the image's height and width. Positions of polygons
are x, y in pixels from the top left corner; pixel (row r, column c) covers c to c + 1 and r to
r + 1, and is in a polygon if its center is. A traced outline runs along the edges of pixels, so a
mask that is traced and filled again is the same mask.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from paligemma_jax.errors import InvalidMaskError
from paligemma_jax.models.mask_vae import MASK_SIDE, NUM_CODES, MaskVAE
from paligemma_jax.processing.image import resize_bilinear_antialias
from paligemma_jax.processing.location_tokens import Box
from paligemma_jax.processing.processor import bucket

MaskSource = str | os.PathLike[str] | Image.Image | np.ndarray
Corners = tuple[float, float, float, float]
Ring = tuple[tuple[float, float], ...]
_OFFSET, _MORE, _SIGN = 48, 0x20, 0x10  # of compressed run lengths
_STEPS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])  # right, down, left, up as x, y
_MAX_PIXELS = 1 << 28
_BINS = 1023
_BATCH = 32  # masks that go through the network together: bounds memory, and compiled shapes


@dataclasses.dataclass(frozen=True)
class RLE:
    """A mask of height x width pixels as COCO's run lengths, read and written as by pycocotools.

    Runs go down the columns, from left to right, and begin with the pixels that are not in the mask
    (0 of them if the first pixel is). Compressed, each run is written in groups of five bits,
    lowest first, a sixth bit saying that more follow, as the character 48 + value; from the third
    run on it is the difference from the run two before. Source: cocoapi, common/maskApi.c.
    """

    height: int
    width: int
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.counts, default=0) < 0 or sum(self.counts) != self.height * self.width:
            raise InvalidMaskError(
                f"Expected run lengths that add to {self.height} x {self.width} pixels, got "
                f'{sum(self.counts)} in all. Check "size", which is [height, width].'
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
                "Expected run lengths as a dictionary of size (height, width) and counts, got "
                f"{str(rle)[:80]}. See RLE.from_mask(mask).to_coco()"
            ) from e
        return cls(height, width, runs)

    def to_coco(self) -> dict[str, Any]:
        """Compressed, ready for JSON: {"size": [height, width], "counts": str}."""
        return {"size": [self.height, self.width], "counts": _compress(self.counts)}

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
            f"Expected a mask as numpy array bool[height, width], got {what}. Convert it, for "
            "example: numpy.asarray(mask) > 127"
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


def tight_corners(mask: np.ndarray) -> Corners:
    """The smallest box around a mask bool[H, W]; raises InvalidMaskError for an empty one."""
    mask = check_mask(mask)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        raise InvalidMaskError(
            f"The mask of {mask.shape[0]} x {mask.shape[1]} pixels is empty, so it has no box."
        )
    height, width = mask.shape
    return (
        float(rows[0] / height),
        float(columns[0] / width),
        float((rows[-1] + 1) / height),
        float((columns[-1] + 1) / width),
    )


def pixel_corners(corners: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """y1, x1, y2, x2 in whole pixels, each rounded; a thin box may come out without pixels.

    Raises InvalidMaskError for corners outside [0, 1] or out of order.
    """
    y1, x1, y2, x2 = (float(corner) for corner in corners)
    if not (0 <= y1 <= y2 <= 1 and 0 <= x1 <= x2 <= 1):
        raise InvalidMaskError(
            f"Expected corners y1 <= y2 and x1 <= x2 from 0 to 1, got {(y1, x1, y2, x2)}. Divide "
            "pixels by the height and width of the image."
        )
    return round(height * y1), round(width * x1), round(height * y2), round(width * x2)


def crop_for_codec(mask: np.ndarray, corners: Sequence[float]) -> np.ndarray:
    """The crop f32[64, 64] in [0, 1] of a mask bool[H, W], resized bilinearly with antialiasing.

    As big_vision makes training data. Raises InvalidMaskError for another kind of array, for a box
    without pixels and for one without any part of the mask.
    """
    mask = check_mask(mask)
    y1, x1, y2, x2 = pixel_corners(corners, *mask.shape)
    crop = mask[y1:y2, x1:x2]
    if not crop.any():  # also without area
        raise InvalidMaskError(
            f"The mask is empty inside the box {tuple(corners)}, in pixels {(y1, x1, y2, x2)}. See "
            "tight_corners(mask)."
        )
    pixels = crop[..., None].astype(np.float32)
    return resize_bilinear_antialias(pixels, MASK_SIDE, MASK_SIDE)[..., 0]


def paste(crop: np.ndarray, corners: Sequence[float], height: int, width: int) -> np.ndarray:
    """The mask bool[height, width] of a decoded crop f32[64, 64]: where it is above 0.5.

    The crop is resized bilinearly to the box in whole pixels; a box without pixels gives an empty
    mask. Raises InvalidMaskError for another shape and for corners that are no box.
    """
    crop = np.asarray(crop, np.float32)
    if crop.shape != (MASK_SIDE, MASK_SIDE):
        raise InvalidMaskError(
            f"Expected one crop [{MASK_SIDE}, {MASK_SIDE}] of MaskCodec.decode, got "
            f"{list(crop.shape)}."
        )
    y1, x1, y2, x2 = pixel_corners(corners, height, width)
    mask = np.zeros((height, width), bool)
    if y2 > y1 and x2 > x1:
        resized = Image.fromarray(crop).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
        mask[y1:y2, x1:x2] = np.asarray(resized) > 0.5
    return mask


@dataclasses.dataclass(frozen=True)
class Polygon:
    """One connected area: its outline, and those of the holes in it, as x, y in pixels."""

    exterior: Ring
    holes: tuple[Ring, ...] = ()

    def __post_init__(self) -> None:
        for ring in (self.exterior, *self.holes):
            if len(ring) < 3:
                raise InvalidMaskError(
                    f"Expected a polygon of at least 3 points (x, y), got {len(ring)}."
                )

    @classmethod
    def from_coco(cls, numbers: Sequence[float]) -> "Polygon":
        """Of COCO's flat list x, y, x, y, ...; raises InvalidMaskError."""
        if len(numbers) % 2:
            raise InvalidMaskError(
                f"Expected a flat list x, y, x, y, ... of one polygon, got {len(numbers)} numbers."
            )
        points = np.asarray(numbers, float).reshape(-1, 2)
        return cls(tuple((float(x), float(y)) for x, y in points))


def polygons_to_mask(polygons: Iterable[Polygon], height: int, width: int) -> np.ndarray:
    """The mask bool[height, width] of pixels whose centers are in any of `polygons`.

    Raises InvalidMaskError for a point more than one pixel outside the image.
    """
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        rings = [np.asarray(ring, float) for ring in (polygon.exterior, *polygon.holes)]
        for points in rings:
            _check_inside(points, height, width)
        mask |= _fill(rings, height, width)
    return mask


def mask_to_polygons(mask: np.ndarray) -> tuple[Polygon, ...]:
    """Outlines of a mask bool[H, W], one polygon for each area connected by the sides of pixels.

    Exteriors run clockwise as seen, holes the other way. An empty mask has none. Raises
    InvalidMaskError for another kind of array.
    """
    rings = _trace(check_mask(mask))
    outer = [ring for ring in rings if _twice_area(ring) > 0]
    holes: list[list[Ring]] = [[] for _ in outer]
    if len(outer) < len(rings):
        # An area that encloses others comes after them, so the first that holds a hole owns it.
        outer.sort(key=_twice_area)
        low = np.array([ring.min(axis=0) for ring in outer])
        high = np.array([ring.max(axis=0) for ring in outer])
        for ring in rings:
            if _twice_area(ring) < 0:
                inside = _beside(ring)
                near = np.flatnonzero(((low < inside) & (inside < high)).all(axis=1))
                owner = next(place for place in near if _holds(outer[place], inside))
                holes[owner].append(_ring(ring))
    found = [Polygon(_ring(ring), tuple(cut)) for ring, cut in zip(outer, holes, strict=True)]
    return tuple(sorted(found, key=lambda polygon: polygon.exterior[0][::-1]))


def _check_inside(points: np.ndarray, height: int, width: int) -> None:
    if not (points.min() >= -1 and points[:, 0].max() <= width + 1
            and points[:, 1].max() <= height + 1):  # fmt: skip
        low, high = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        raise InvalidMaskError(
            f"Expected points (x, y) inside the image of {width} x {height} pixels, got a polygon "
            f"from {low} to {high}. Give the size of the image it was drawn on."
        )


def _fill(rings: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Even-odd rule at the centers of pixels."""
    turns = np.zeros((height, width + 1), np.int32)
    for points in rings:
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            if y0 > y1:
                x0, y0, x1, y1 = x1, y1, x0, y0
            # Rows whose center r + 0.5 is in [y0, y1): each corner counts once.
            rows = np.arange(max(0, int(np.ceil(y0 - 0.5))), min(height, int(np.ceil(y1 - 0.5))))
            if rows.size:
                crossings = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
                columns = np.clip(np.ceil(crossings - 0.5), 0, width).astype(int)
                turns[rows, columns] += 1
    return np.cumsum(turns, axis=1)[:, :width] % 2 == 1


def _trace(mask: np.ndarray) -> list[np.ndarray]:
    """Corners i[n, 2] of every closed outline, with the mask to the right of each step."""
    padded = np.pad(mask, 1)
    inner = padded[1:-1, 1:-1]
    # For each step of _STEPS: the pixel on its left is outside, and where the step begins.
    outside = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    begins = ((0, 0), (1, 0), (1, 1), (0, 1))
    leaving: dict[tuple[int, int], list[int]] = {}
    for way, (neighbor, (right, down)) in enumerate(zip(outside, begins, strict=True)):
        rows, columns = np.nonzero(inner & ~neighbor)
        for x, y in zip((columns + right).tolist(), (rows + down).tolist(), strict=True):
            leaving.setdefault((x, y), []).append(way)
    return [_follow(leaving, start) for start in sorted(leaving) if start in leaving]


def _follow(leaving: dict[tuple[int, int], list[int]], start: tuple[int, int]) -> np.ndarray:
    """Takes one closed outline from `leaving`, which maps positions to the steps from there."""
    first = leaving[start][0]
    corners: list[tuple[int, int]] = []
    position, way, turned = start, first, True
    while True:
        if turned:
            corners.append(position)
        step = _STEPS[way]
        position = (position[0] + int(step[0]), position[1] + int(step[1]))
        # Where two pixels touch at a corner only, a right turn stays with the same pixel.
        choices = leaving[position]
        following = next(w for w in ((way + 1) % 4, way, (way + 3) % 4) if w in choices)
        choices.remove(following)
        if not choices:
            del leaving[position]
        turned = following != way
        way = following
        if (position, way) == (start, first):
            # The start need not be a corner.
            return np.array(corners if turned else corners[1:])


def _ring(points: np.ndarray) -> Ring:
    return tuple((float(x), float(y)) for x, y in points)


def _twice_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))


def _beside(points: np.ndarray) -> np.ndarray:
    """The center x, y of a pixel of the mask, to the right of an outline's first step."""
    step = np.sign(points[1] - points[0])
    return points[0] + 0.5 * step + 0.5 * np.array([-step[1], step[0]])


def _holds(points: np.ndarray, position: np.ndarray) -> bool:
    ends = np.roll(points, -1, axis=0)
    low, high = np.minimum(points[:, 1], ends[:, 1]), np.maximum(points[:, 1], ends[:, 1])
    # Outlines of pixels: only upright sides are crossed by a line along a row.
    crossed = (low <= position[1]) & (position[1] < high) & (points[:, 0] > position[0])
    return bool(np.count_nonzero(crossed) % 2)


def load_mask(source: MaskSource, value: int | None = None) -> np.ndarray:
    """The mask bool[H, W] of an image of one channel: a path, a PIL image, or an array.

    Inside is what has `value` (an instance or class in a label map; the index in images with a
    palette). Without it, inside is what is brighter than half of the brightest pixel, so that
    0 and 1, 0 and 255, and soft edges are all read as they are meant.

    Raises InvalidMaskError for what is no mask.
    """
    pixels = _pixels(source)
    if pixels.dtype == bool and value is None:
        return pixels
    if value is not None:
        return pixels == value
    brightest = pixels.max(initial=0)
    return pixels > brightest / 2


def mask_from_coco(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask bool[height, width] of COCO's "segmentation": polygons, or run lengths of any kind.

    Raises InvalidMaskError for anything else, and for run lengths of another size.
    """
    if isinstance(segmentation, Mapping):
        rle = RLE.from_coco(segmentation)
        if (rle.height, rle.width) != (height, width):
            raise InvalidMaskError(
                f"Expected run lengths of an image of {height} x {width} pixels, got "
                f'{rle.height} x {rle.width}. Check "size".'
            )
        return rle.to_mask()
    if isinstance(segmentation, Sequence) and not isinstance(segmentation, str) and segmentation:
        polygons = [Polygon.from_coco(numbers) for numbers in segmentation]
        return polygons_to_mask(polygons, height, width)
    raise InvalidMaskError(
        'Expected a list of polygons, or a dictionary of "size" and "counts", as COCO writes '
        f"them; got {str(segmentation)[:80]!r}."
    )


def _pixels(source: MaskSource) -> np.ndarray:
    if isinstance(source, np.ndarray):
        pixels = source
    else:
        try:
            image = source if isinstance(source, Image.Image) else Image.open(Path(source))
            if image.width * image.height > _MAX_PIXELS:
                raise InvalidMaskError(
                    f"Expected a mask of at most {_MAX_PIXELS:,} pixels, got {image.height} x "
                    f"{image.width}."
                )
            pixels = np.asarray(image)
        except (OSError, UnidentifiedImageError, SyntaxError) as e:
            raise InvalidMaskError(
                f"{source} cannot be read as a mask: {e}. Expected an image file of one channel, "
                "such as a gray PNG."
            ) from e
    if pixels.ndim == 3 and pixels.shape[2] in (1, 3) and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]  # gray, saved as RGB
    if pixels.ndim != 2 or not pixels.size or pixels.dtype.kind not in "biuf":
        raise InvalidMaskError(
            "Expected a mask [height, width] with one number a pixel, got "
            f"{pixels.dtype}{list(pixels.shape)}. Choose a channel: pixels[..., 0]"
        )
    return pixels


@dataclasses.dataclass(frozen=True)
class MaskCodec:
    """The VQ-VAE behind `<seg000>` .. `<seg127>`, numpy in and out."""

    model: MaskVAE

    def encode(self, crops: np.ndarray) -> np.ndarray:
        """Codes i32[n, 16] of masks f32[n, 64, 64] in [0, 1], each cut to its object's box.

        Raises InvalidMaskError for another shape.
        """
        crops = np.asarray(crops, np.float32)
        if crops.ndim != 3 or crops.shape[1:] != (MASK_SIDE, MASK_SIDE):
            raise InvalidMaskError(
                f"Expected masks [n, {MASK_SIDE}, {MASK_SIDE}], got {list(crops.shape)}. Cut masks "
                "to their boxes with crop_for_codec."
            )
        codes = [_encode(self.model, part)[:real] for part, real in _batches(crops[..., None])]
        return np.concatenate([np.zeros((0, NUM_CODES), np.int32), *map(np.asarray, codes)])

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Masks f32[n, 64, 64], nominally in [0, 1] with 0.5 at the edge, of codes i32[n, 16].

        Raises InvalidMaskError for another shape or codes that are not of the codebook.
        """
        codes = np.asarray(codes)
        codes = codes if codes.size else np.zeros((0, NUM_CODES), np.int32)
        count = self.model.config.num_embeddings
        fits = codes.ndim == 2 and codes.shape[1] == NUM_CODES
        if not fits or (codes.size and not 0 <= codes.min() <= codes.max() < count):
            raise InvalidMaskError(
                f"Expected codes [n, {NUM_CODES}] from 0 to {count - 1}, as <seg> tokens give "
                f"them, got {codes.dtype}{list(codes.shape)}."
            )
        batches = _batches(codes.astype(np.int32))
        masks = [_decode(self.model, part)[:real] for part, real in batches]
        empty = np.zeros((0, MASK_SIDE, MASK_SIDE), np.float32)
        return np.concatenate([empty, *map(np.asarray, masks)])


def _batches(rows: np.ndarray) -> list[tuple[jax.Array, int]]:
    """Batches of at most 32 rows, filled up to a power of two, and how many rows are real."""
    parts = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        fill = bucket(len(part)) - len(part)
        filled = np.pad(part, [(0, fill)] + [(0, 0)] * (rows.ndim - 1))
        parts.append((jnp.asarray(filled), len(part)))
    return parts


@jax.jit
def _encode(model: MaskVAE, masks: jax.Array) -> jax.Array:
    return model.encode(masks)


@jax.jit
def _decode(model: MaskVAE, codes: jax.Array) -> jax.Array:
    return model.decode(codes)[..., 0] * 0.5 + 0.5


def encode_masks(codec: MaskCodec, masks: Sequence[np.ndarray], labels: Sequence[str]) -> list[Box]:
    """One object for each mask bool[H, W]: its tight box, its label and its sixteen codes.

    `format_answer` writes them as the suffix to train on. The box is that of the location tokens,
    so that a mask is cut as it will be pasted. Raises InvalidMaskError naming the mask that is
    empty or no mask, and for another number of labels.
    """
    if len(masks) != len(labels):
        raise InvalidMaskError(
            f"Expected a label ('' for none) for each of {len(masks)} masks, got {len(labels)}."
        )
    crops, boxes = [], []
    for number, mask in enumerate(masks):
        try:
            tight = np.array(tight_corners(mask))
            # Outward, or a thin object could lose all of its pixels.
            low, high = np.floor(tight[:2] * _BINS), np.ceil(tight[2:] * _BINS)
            y1, x1, y2, x2 = (np.concatenate([low, high]) / _BINS).tolist()
            crops.append(crop_for_codec(mask, (y1, x1, y2, x2)))
        except InvalidMaskError as e:
            raise InvalidMaskError(f"masks[{number}]: {e}") from e
        boxes.append((y1, x1, y2, x2))
    if not crops:
        return []
    codes = codec.encode(np.stack(crops)).tolist()
    return [
        Box(label, *box, codes=tuple(row))
        for label, box, row in zip(labels, boxes, codes, strict=True)
    ]
