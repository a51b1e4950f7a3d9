"""Readers of images with objects: boxes, masks, and expressions that refer to them."""

import dataclasses
import hashlib
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from paligemma_jax.data.readers import (
    Example,
    ImageColumns,
    Reader,
    column,
    images_in,
    is_whole,
    texts_of,
)
from paligemma_jax.data.record import Record
from paligemma_jax.data.transforms import index_in_turn
from paligemma_jax.errors import (
    ConfigError,
    DatasetError,
    InvalidMaskError,
    InvalidPromptError,
    PaliGemmaError,
)
from paligemma_jax.processing import prompts
from paligemma_jax.processing.image import ImageSource, load_image, resize_bilinear_antialias
from paligemma_jax.processing.location_tokens import Box, format_answer
from paligemma_jax.processing.masks import (
    MaskCodec,
    crop_for_codec,
    encode_masks,
    load_mask,
    mask_from_coco,
)

Corners = tuple[float, float, float, float]  # y1, x1, y2, x2 as fractions of the image


def box_corners(numbers: Any, box_format: str, width: int, height: int) -> Corners:
    """Four numbers of a box in an image of width x height pixels -> its corners.

    `box_format` is "xywh" (COCO), "xyxy" (Pascal VOC) or "yxyx" in pixels, or one of them as
    fractions of the image, such as "rel_yxyx" (TensorFlow Datasets). Raises ConfigError for
    another format, DatasetError for anything else than four numbers.
    """
    order = box_format.removeprefix("rel_")
    if order not in ("xywh", "xyxy", "yxyx"):
        raise ConfigError(
            f"box_format must be 'xywh', 'xyxy' or 'yxyx', or 'rel_' before one of them, got "
            f"{box_format!r}"
        )
    try:
        first, second, third, fourth = (float(number) for number in numbers)
    except (TypeError, ValueError) as e:
        raise DatasetError(f"expected a box of four numbers, got {str(numbers)[:60]}") from e
    if order == "yxyx":
        first, second, third, fourth = second, first, fourth, third
    if order == "xywh":
        third, fourth = first + third, second + fourth
    if box_format != order:
        return second, first, fourth, third
    return second / height, first / width, fourth / height, third / width


def clip(corners: Sequence[float], slack: float = 1e-3) -> tuple[Corners, str]:
    """The part of a box inside the image, and what was wrong with it; "" if nothing was.

    No more than `slack` outside is rounding, and not told. Raises DatasetError for a box without
    area in the image, and for NaN or infinity.
    """
    y1, x1, y2, x2 = (float(value) for value in corners)
    box = f"the box y1 {y1:.4g}, x1 {x1:.4g}, y2 {y2:.4g}, x2 {x2:.4g}"
    if not all(math.isfinite(value) for value in (y1, x1, y2, x2)):
        raise DatasetError(f"{box} is not finite.")
    if y2 <= y1 or x2 <= x1:
        raise DatasetError(f"{box} has no area, expected y1 < y2 and x1 < x2.")
    kept = (max(0.0, y1), max(0.0, x1), min(1.0, y2), min(1.0, x2))
    if kept[2] <= kept[0] or kept[3] <= kept[1]:
        raise DatasetError(f"{box} is outside of the image, expected fractions from 0 to 1.")
    outside = max(abs(a - b) for a, b in zip(kept, (y1, x1, y2, x2), strict=True))
    return kept, f"{box} leaves the image; clipped" if outside > slack else ""


@dataclasses.dataclass(frozen=True)
class Outlined:
    """Records of another reader with a red box of one pixel, as WidgetCap marks its widgets.

    Attributes:
      reader: makes the records.
      size: pixels of the square that the image is resized to first; the processor's.
      box: a column with y1, x1, y2, x2 as fractions of the image.
    """

    reader: Reader
    size: int
    box: str = "bbox"

    @property
    def image_fields(self) -> tuple[str, ...]:
        """The columns of images."""
        return self.reader.image_fields

    def __call__(self, example: Example, record_id: str) -> Record:
        record = self.reader(example, record_id)
        box = _fractions(column(example, self.box), self.box)
        top, left, bottom, right = (int(v * (self.size - 1)) for v in box.tolist())
        drawn = []
        for image in _loaded(record.images):
            resized = resize_bilinear_antialias(np.asarray(image), self.size, self.size)
            pixels = np.clip(resized, 0, 255).astype(np.uint8)
            pixels[[top, bottom], left : right + 1] = (255, 0, 0)
            pixels[top : bottom + 1, [left, right]] = (255, 0, 0)
            drawn.append(Image.fromarray(pixels))
        return dataclasses.replace(record, images=tuple(drawn), size=None)


@dataclasses.dataclass(frozen=True)
class ObjectReader(ImageColumns):
    """`detect ...` for images with lists of boxes and labels; with a codec `segment ...`, of masks.

    Attributes:
      classes: what every prompt asks for; labels that are numbers are indices into it. Without, a
        prompt asks for what is in its image, and examples without objects are an error.
      labels, boxes, masks: columns, as in Hugging Face's COCO-like data sets. Masks are polygons or
        run lengths as COCO writes them, or arrays [H, W].
      box_format: order and units of the numbers of a box, see `box_corners`.
      codec: encodes masks; a run sets it where `Data(..., masks=True)`.
    """

    classes: tuple[str, ...] = ()
    labels: str = "objects.category"
    boxes: str = "objects.bbox"
    box_format: str = "xywh"
    masks: str = "objects.segmentation"
    codec: MaskCodec | None = dataclasses.field(default=None, compare=False, repr=False)

    def __call__(self, example: Example, record_id: str) -> Record:
        images = _loaded(images_in(example, self.image))
        if len(images) != 1:
            raise DatasetError(f"{self.image!r}: expected one image, got {len(images)}")
        image, names = images[0], [self._name(one) for one in column(example, self.labels)]
        labels = list(self.classes) or list(dict.fromkeys(names))
        if not labels:
            raise DatasetError(
                "there are no objects, so nothing to ask for. Give the classes, and the answer is "
                "empty: classes=('cat', 'dog')"
            )
        field = self.boxes if self.codec is None else self.masks
        values = list(column(example, field))
        if len(values) != len(names):
            raise DatasetError(
                f"{field!r} has {len(values)} entries and {self.labels!r} {len(names)}, expected "
                "a label for each"
            )
        try:
            if self.codec is None:
                prefix, boxes = prompts.detect(labels), []
                for name, numbers in zip(names, values, strict=True):
                    corners, _ = clip(box_corners(numbers, self.box_format, *image.size))
                    boxes.append(Box(name, *corners))
            else:
                prefix = prompts.segment(labels)
                masks = [_mask_of(value, image.height, image.width) for value in values]
                boxes = encode_masks(self.codec, masks, names)
            return Record((image,), prefix, format_answer(boxes), record_id, size=image.size)
        except (DatasetError, InvalidMaskError, InvalidPromptError) as e:
            raise DatasetError(f"{field!r}: {e}") from e

    def _name(self, label: Any) -> str:
        if is_whole(label):
            if not 0 <= label < len(self.classes):
                raise DatasetError(
                    f"{self.labels!r} holds the number {label}, and there are {len(self.classes)} "
                    "classes. Give all names: classes=('cat', 'dog')"
                )
            label = self.classes[int(label)]
        label = bytes(label).decode("utf-8", "replace") if isinstance(label, bytes) else label
        if self.classes and label not in self.classes:
            raise DatasetError(
                f"{self.labels!r}: expected one of {', '.join(self.classes)}, got {label!r}"
            )
        return label


def _mask_of(value: Any, height: int, width: int) -> np.ndarray:
    if isinstance(value, np.ndarray) and value.shape[:2] == (height, width):
        return value.reshape(height, width) > 0
    return mask_from_coco(value, height, width)


@dataclasses.dataclass(frozen=True)
class ReferringRecord(Record):
    """An image with all its objects; prompt and answer are the first one's until one is chosen.

    `objects` are the expressions that refer to each, and its location and mask tokens.
    """

    objects: tuple[tuple[tuple[str, ...], str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Referring(ImageColumns):
    """Images with objects, and the expressions that refer to each: a `ReferringRecord`.

    As big_vision trains RefCOCO: the expression alone is the prompt; the answer is the annotated
    box and the codes of the mask inside it, without a label (pp/proj/paligemma/segmentation.py).
    `CycleObjects` chooses among them. The codes of masks are cached.

    Attributes:
      masks: column of PNG files or arrays [H, W] or [H, W, 3], one an object, of the whole image.
      boxes: column of y1, x1, y2, x2 as fractions of the image.
      expressions: column with a list of texts an object.
      codec: of the checkpoint; a run sets it where `Data(..., masks=True)`.
    """

    masks: str = "objects.mask"
    boxes: str = "objects.bbox"
    expressions: str = "objects.refs.sentence"
    codec: MaskCodec | None = dataclasses.field(default=None, compare=False, repr=False)
    _cache: dict[bytes, str] = dataclasses.field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __call__(self, example: Example, record_id: str) -> Record:
        masks, given = list(column(example, self.masks)), list(column(example, self.boxes))
        texts = list(column(example, self.expressions))
        if not len(masks) == len(given) == len(texts) or not masks:
            raise DatasetError(
                f"expected a mask, a box and a list of expressions for each object, got "
                f"{len(masks)} masks, {len(given)} boxes and {len(texts)} lists"
            )
        boxes = [_fractions(box, self.boxes) for box in given]
        suffixes = self._suffixes(masks, boxes)
        objects = tuple(
            (texts_of(text, self.expressions), suffix)
            for text, suffix in zip(texts, suffixes, strict=True)
        )
        expressions, suffix = objects[0]
        images = images_in(example, self.image)
        return ReferringRecord(images, expressions[0], suffix, record_id, objects=objects)

    def _suffixes(self, masks: list[Any], boxes: list[np.ndarray]) -> list[str]:
        keys = [_mask_key(mask, box) for mask, box in zip(masks, boxes, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self._cache]
        if new:
            if self.codec is None:
                raise DatasetError(
                    "masks need a mask codec to become tokens, and there is none. Use a checkpoint "
                    "that has one, with: Data(..., reader=Referring(), masks=True)"
                )
            try:
                crops = np.stack([_crop(masks[i], boxes[i]) for i in new])
            except InvalidMaskError as e:
                raise DatasetError(f"{self.masks!r}: {e}") from e
            for i, codes in zip(new, self.codec.encode(crops).tolist(), strict=True):
                bins = np.clip(np.rint(boxes[i] * np.float32(1023)), 0, 1023).astype(int).tolist()
                self._cache[keys[i]] = "".join(f"<loc{value:04d}>" for value in bins) + "".join(
                    f"<seg{code:03d}>" for code in codes
                )
        return [self._cache[key] for key in keys]


@dataclasses.dataclass(frozen=True)
class CycleObjects:
    """A transform: one object of a `ReferringRecord`, each once before any repeats.

    The expression is one of the object's at random.
    """

    seed: int = 0

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if not isinstance(record, ReferringRecord) or not record.objects:
            return record
        index = index_in_turn(record, len(record.objects), self.seed)
        expressions, suffix = record.objects[index]
        prefix = expressions[int(rng.integers(len(expressions)))]
        return dataclasses.replace(record, prefix=prefix, suffix=suffix, objects=())


def _loaded(images: tuple[ImageSource, ...]) -> list[Image.Image]:
    try:
        return [load_image(image) for image in images]
    except PaliGemmaError as e:
        raise DatasetError(str(e)) from e


def _fractions(values: Any, name: str) -> np.ndarray:
    """A box f32[4] of y1, x1, y2, x2 as fractions; raises DatasetError."""
    try:
        box = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        box = np.zeros(0, np.float32)
    if box.shape != (4,) or not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
        raise DatasetError(
            f"{name!r}: expected a box of y1, x1, y2, x2 from 0 to 1, got {str(values)[:60]}. "
            "Divide pixels by the height and width of the image."
        )
    return box


def _crop(source: Any, box: np.ndarray) -> np.ndarray:
    if isinstance(source, bytes | np.bytes_):
        try:
            with Image.open(io.BytesIO(source)) as image:
                source = np.asarray(image)
        except (OSError, UnidentifiedImageError) as e:
            raise InvalidMaskError(f"expected a gray PNG of the image's size: {e}") from e
    mask = load_mask(source)
    size = np.array([*mask.shape, *mask.shape], np.float32)
    # In float32, as there: a box that ends between two pixels is rounded to the same one.
    return crop_for_codec(mask, (np.rint(size * box) / size.astype(np.float64)).tolist())


def _mask_key(mask: Any, box: np.ndarray) -> bytes:
    pixels = np.asarray(mask)
    content = mask if isinstance(mask, bytes) else pixels.tobytes()
    return hashlib.sha256(f"{pixels.shape} {box.tolist()}".encode() + content).digest()
