"""Rows of any data set -> records: which columns hold what, and the prompt of the task.

A column inside another is named with a dot: "objects.bbox". Text may be bytes in UTF-8.

Readers and a transform for the prompts that big_vision's transfer configurations write.

Rows of objects with masks and expressions -> records of one of them, as RefCOCO is learnt.

From big_vision's pp/proj/paligemma/segmentation.py and its builder of RefCOCO: the expression alone
is the prompt; the answer is the annotated box and the codes of the mask inside it, without a label.

The orders and units that data sets write boxes in.

Rows with boxes or masks -> records that ask for them.
"""

import dataclasses
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, UnidentifiedImageError

from paligemma_jax.data.record import Record
from paligemma_jax.data.transforms import place_in_turn
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

Row = Mapping[str, Any]


@runtime_checkable
class Reader(Protocol):
    """Makes a record of a row; raises DatasetError, which the source adds the place to."""

    @property
    def image_fields(self) -> tuple[str, ...]:
        """Columns that may hold the names of picture files."""
        ...

    def __call__(self, row: Row, place: str) -> Record: ...


@dataclasses.dataclass(frozen=True)
class ImageColumns:
    """A reader of rows with pictures; `image` is their column, or a tuple of several."""

    image: str | tuple[str, ...] = "image"

    @property
    def image_fields(self) -> tuple[str, ...]:
        """The columns of pictures."""
        return (self.image,) if isinstance(self.image, str) else self.image


@dataclasses.dataclass(frozen=True)
class Fields(ImageColumns):
    """Rows that hold the prompt and the answer; a list of answers gives `Record.answers`.

    A list of pictures under `image`, or under its plural, gives several for one prompt. Also for
    data whose question is the whole prompt: Fields(prefix="question", suffix="answers").
    """

    prefix: str = "prefix"
    suffix: str = "suffix"
    id: str = "id"

    @property
    def image_fields(self) -> tuple[str, ...]:
        named = super().image_fields
        return (*named, *(f"{name}s" for name in named))

    def __call__(self, row: Row, place: str) -> Record:
        name = self.image
        if isinstance(name, str) and name not in row and f"{name}s" in row:
            name = f"{name}s"
        given = row.get(self.id)
        number = isinstance(given, int | np.integer) and not isinstance(given, bool)
        known = str(given) if number or (isinstance(given, str) and given) else place
        return record_of(
            images_in(row, name), text_in(row, self.prefix), texts_in(row, self.suffix), known
        )


@dataclasses.dataclass(frozen=True)
class Caption(ImageColumns):
    """`caption en`; `text` is a column with one caption or several."""

    text: str = "caption"
    language: str = "en"

    def __call__(self, row: Row, place: str) -> Record:
        prefix = prompts.caption(self.language)
        return record_of(images_in(row, self.image), prefix, texts_in(row, self.text), place)


@dataclasses.dataclass(frozen=True)
class QuestionAnswer(ImageColumns):
    """`answer en ...`; `answers` is a column with one answer or several, or with a number."""

    question: str = "question"
    answers: str = "answer"
    language: str = "en"

    def __call__(self, row: Row, place: str) -> Record:
        question = text_in(row, self.question)
        try:
            prompts.answer(question, self.language)
        except InvalidPromptError as e:
            raise DatasetError(f"{self.question}: {e}") from e
        # As it stands, spaces at its ends too: so were the published models trained.
        prefix = f"answer {self.language} {question}"
        number = column(row, self.answers)
        whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
        answers = (str(number),) if whole else texts_in(row, self.answers)
        return record_of(images_in(row, self.image), prefix, answers, place)


@dataclasses.dataclass(frozen=True)
class Ocr(ImageColumns):
    """`ocr`; `text` is a column with what can be read."""

    text: str = "text"

    def __call__(self, row: Row, place: str) -> Record:
        prefix = prompts.ocr()
        return record_of(images_in(row, self.image), prefix, texts_in(row, self.text), place)


def column(row: Row, name: str) -> Any:
    """The value of a column; a list where a list of rows is on the way. Raises DatasetError."""
    value: Any = row
    for part in name.split("."):
        if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            value = [column(entry, part) for entry in value]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and not value:
            return []
        else:
            keys = ", ".join(map(str, row)) or "nothing"
            raise DatasetError(
                f"the field {name!r} is missing; there is {keys}. Every record needs it. Add it, "
                "or name the fields you have, for example: reader=Fields(prefix='question')"
            )
    return value


def images_in(row: Row, name: str | tuple[str, ...]) -> tuple[ImageSource, ...]:
    """One picture or several, of one column or several; raises DatasetError for none."""
    if not isinstance(name, str):
        return tuple(image for one in name for image in images_in(row, one))
    value = column(row, name)
    if isinstance(value, np.ndarray) and (value.ndim == 4 or value.dtype == object):
        value = list(value)  # frames, or pictures that are encoded
    several = isinstance(value, list | tuple)
    images = tuple(_image(entry) for entry in (value if several else [value]))
    if not images or any(image is None for image in images):
        raise DatasetError(
            f"{name!r} is {'null' if images else 'an empty list'}. A picture, or a list of "
            "pictures, fits. Leave the record out, or name its picture."
        )
    return images


def text_in(row: Row, name: str) -> str:
    """One text; raises DatasetError for anything else."""
    return _text(column(row, name), name)


def texts_in(row: Row, name: str) -> tuple[str, ...]:
    """One text or several; raises DatasetError for an empty list and for anything else."""
    return texts_of(column(row, name), name)


def texts_of(value: Any, name: str) -> tuple[str, ...]:
    """The texts of a value of the column `name`; raises DatasetError as `texts_in`."""
    if isinstance(value, np.ndarray):
        value = list(value)
    if not isinstance(value, list | tuple):
        return (_text(value, name),)
    if not value:
        raise DatasetError(
            f"{name!r} is an empty list. At least one text fits. Leave the record out, or add one."
        )
    return tuple(_text(entry, name) for entry in value)


def record_of(
    images: tuple[ImageSource, ...], prefix: str, answers: tuple[str, ...], place: str
) -> Record:
    """A record of one answer or several."""
    suffix = answers[0]
    kept = answers if len(answers) > 1 else ()
    return Record(images=images, prefix=prefix, suffix=suffix, id=place, answers=kept)


def _text(value: Any, name: str) -> str:
    if isinstance(value, bytes | np.bytes_):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError as e:
            raise DatasetError(f"{name!r} is not UTF-8. Text in UTF-8 fits.") from e
    if not isinstance(value, str):
        raise DatasetError(
            f"{name!r} is {_readers_shown(value)}. A text fits. Write it in quotation marks, "
            "or correct it."
        )
    return str(value)


def _image(value: Any) -> Any:
    """A picture as `load_image` takes it; Hugging Face keeps files as {"bytes", "path"}."""
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        return value.get("bytes") or value.get("path")
    if isinstance(value, np.bytes_):
        return bytes(value)
    return value


def _readers_shown(value: Any) -> str:
    return "null" if value is None else f"{str(value)[:40]!r} ({type(value).__name__})"


_OPTIONS = re.compile(r"Options: (\(A\) .*)\nAnswer:", re.DOTALL)
_BETWEEN = re.compile(r", (?=\([A-Z]\) )")
_CHOSEN = re.compile(r"The answer is ([A-Z])\.")
_RED = (255, 0, 0)


@dataclasses.dataclass(frozen=True)
class ShuffleOptions:
    """The options of a question of ScienceQA in random order, with the letter of the answer."""

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        found, chosen = _OPTIONS.search(record.prefix), _CHOSEN.fullmatch(record.suffix)
        if found is None or chosen is None:
            return record
        options = [option[4:] for option in _BETWEEN.split(found[1])]
        order = rng.permutation(len(options)).tolist()
        letter = _letter(order.index(ord(chosen[1]) - ord("A")))
        start, end = found.span(1)
        shuffled = _lettered([options[place] for place in order])
        return dataclasses.replace(
            record,
            prefix=record.prefix[:start] + shuffled + record.prefix[end:],
            suffix=f"The answer is {letter}.",
        )


@dataclasses.dataclass(frozen=True)
class Outlined:
    """Records of another reader with a red box of one pixel, as WidgetCap shows what is meant.

    Attributes:
      reader: makes the records.
      size: pixels of the square that the picture is resized to first; the processor's.
      box: a column with y1, x1, y2, x2 as fractions of the picture.
    """

    reader: Reader
    size: int
    box: str = "bbox"

    @property
    def image_fields(self) -> tuple[str, ...]:
        """The columns of pictures."""
        return self.reader.image_fields

    def __call__(self, row: Row, place: str) -> Record:
        record = self.reader(row, place)
        try:
            y1, x1, y2, x2 = (float(value) for value in column(row, self.box))
        except (TypeError, ValueError) as e:
            if isinstance(e, DatasetError):
                raise
            raise DatasetError(f"{self.box!r} is no box. Four fractions y1, x1, y2, x2 fit.") from e
        if not (0 <= y1 <= y2 <= 1 and 0 <= x1 <= x2 <= 1):
            raise DatasetError(
                f"{self.box!r} is {(y1, x1, y2, x2)}. y1 <= y2 and x1 <= x2, all from 0 to 1, fit. "
                "Divide pixels by the height and width of the picture."
            )
        try:
            pictures = [load_image(image) for image in record.images]
        except PaliGemmaError as e:
            raise DatasetError(str(e)) from e
        top, left, bottom, right = (int(v * (self.size - 1)) for v in (y1, x1, y2, x2))
        drawn = []
        for picture in pictures:
            resized = resize_bilinear_antialias(np.asarray(picture), self.size, self.size)
            pixels = np.clip(resized, 0, 255).astype(np.uint8)
            pixels[[top, bottom], left : right + 1] = _RED
            pixels[top : bottom + 1, [left, right]] = _RED
            drawn.append(Image.fromarray(pixels))
        return dataclasses.replace(record, images=tuple(drawn), size=None)


def _lettered(choices: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"({_letter(place)}) {text}" for place, text in enumerate(choices))


def _letter(place: int) -> str:
    return chr(ord("A") + place)


_BINS = 1023


@dataclasses.dataclass(frozen=True)
class Referred:
    """An object: what it is called, and the answer that names its place."""

    expressions: tuple[str, ...]
    suffix: str


@dataclasses.dataclass(frozen=True)
class ReferringRecord(Record):
    """A picture with all its objects; prompt and answer are the first one's until one is chosen."""

    objects: tuple[Referred, ...] = ()


@dataclasses.dataclass(frozen=True)
class Referring(ImageColumns):
    """Rows of one picture, its objects and the expressions of each: a `ReferringRecord`.

    `CycleObjects` chooses among them. Masks are encoded when they are first met, and the codes kept.

    Attributes:
      masks: column of PNG files or arrays [H, W] or [H, W, 3], one an object, of the whole picture.
      boxes: column of y1, x1, y2, x2 as fractions of the picture.
      expressions: column with a list of texts an object.
      codec: of the checkpoint; a run puts it in where `Data(..., masks=True)`.
    """

    masks: str = "objects.mask"
    boxes: str = "objects.bbox"
    expressions: str = "objects.refs.sentence"
    codec: MaskCodec | None = dataclasses.field(default=None, compare=False, repr=False)
    _known: dict[bytes, str] = dataclasses.field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __call__(self, row: Row, place: str) -> Record:
        masks, boxes = list(column(row, self.masks)), list(column(row, self.boxes))
        texts = list(column(row, self.expressions))
        if not len(masks) == len(boxes) == len(texts):
            raise DatasetError(
                f"there are {len(masks)} masks, {len(boxes)} boxes and {len(texts)} lists of "
                "expressions. One of each an object fits. Correct the record."
            )
        if not masks:
            raise DatasetError("there are no objects. At least one fits. Leave the record out.")
        objects = tuple(
            Referred(texts_of(text, self.expressions), suffix)
            for text, suffix in zip(texts, self._suffixes(masks, boxes), strict=True)
        )
        first = objects[0]
        images = images_in(row, self.image)
        return ReferringRecord(images, first.expressions[0], first.suffix, place, objects=objects)

    def _suffixes(self, masks: list[Any], boxes: list[Any]) -> list[str]:
        keys = [_key(mask, box) for mask, box in zip(masks, boxes, strict=True)]
        new = [place for place, key in enumerate(keys) if key not in self._known]
        if new:
            if self.codec is None:
                raise DatasetError(
                    "masks become tokens by a mask codec, and there is none. A checkpoint that has "
                    "one fits, with: Data(..., reader=Referring(), masks=True)"
                )
            try:
                crops = np.stack([_crop(masks[place], _box(boxes[place])) for place in new])
            except InvalidMaskError as e:
                raise DatasetError(f"{self.masks!r}: {e}") from e
            for place, codes in zip(new, self.codec.encode(crops).tolist(), strict=True):
                self._known[keys[place]] = _suffix(_box(boxes[place]), codes)
        return [self._known[key] for key in keys]


@dataclasses.dataclass(frozen=True)
class CycleObjects:
    """One object of a `ReferringRecord`, another every epoch until all have come, and any name."""

    seed: int = 0

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if not isinstance(record, ReferringRecord) or not record.objects:
            return record
        chosen = record.objects[place_in_turn(record, len(record.objects), self.seed)]
        name = chosen.expressions[int(rng.integers(len(chosen.expressions)))]
        return dataclasses.replace(record, prefix=name, suffix=chosen.suffix, objects=())


def _box(values: Any) -> np.ndarray:
    try:
        box = np.asarray(values, np.float32)
    except (TypeError, ValueError) as e:
        raise DatasetError(f"the box {values} is none. Four fractions y1, x1, y2, x2 fit.") from e
    if box.shape != (4,) or not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
        raise DatasetError(
            f"the box {values} is none. y1, x1, y2, x2 from 0 to 1 fit. Divide pixels by the "
            "height and width of the picture."
        )
    return box


def _crop(source: Any, box: np.ndarray) -> np.ndarray:
    if isinstance(source, bytes | np.bytes_):
        try:
            with Image.open(io.BytesIO(source)) as image:
                source = np.asarray(image)
        except (OSError, UnidentifiedImageError) as e:
            raise InvalidMaskError(
                f"A mask cannot be read: {e}. A grey PNG of the picture's size fits."
            ) from e
    mask = load_mask(source)
    height, width = mask.shape
    size = np.array([height, width, height, width], np.float32)
    # In float32, as there: a box that ends between two pixels is rounded to the same one.
    return crop_for_codec(mask, (np.rint(size * box) / size.astype(np.float64)).tolist())


def _suffix(box: np.ndarray, codes: list[int]) -> str:
    locations = np.clip(np.rint(box * np.float32(_BINS)), 0, _BINS).astype(int).tolist()
    where = "".join(f"<loc{value:04d}>" for value in locations)
    return where + "".join(f"<seg{code:03d}>" for code in codes)


def _key(mask: Any, box: Any) -> bytes:
    pixels = np.asarray(mask)
    content = mask if isinstance(mask, bytes) else pixels.tobytes()
    head = f"{pixels.shape} {_box(box).tolist()}".encode()
    return hashlib.sha256(head + content).digest()


Corners = tuple[float, float, float, float]  # y1, x1, y2, x2 as fractions of the picture


def box_corners(numbers: Sequence[float], box_format: str, width: int, height: int) -> Corners:
    """Four numbers of a box in a picture of width x height pixels -> its corners.

    `box_format` is "xywh" (COCO), "xyxy" (Pascal VOC) or "yxyx" in pixels, with "rel_" in front
    ("rel_yxyx": TensorFlow Datasets) as fractions of the picture. Raises ConfigError for others.
    """
    order = box_format.removeprefix("rel_")
    if order not in ("xywh", "xyxy", "yxyx"):
        raise ConfigError(
            f"box_format must be 'xywh', 'xyxy' or 'yxyx', or one of them after 'rel_', got "
            f"{box_format!r}"
        )
    first, second, third, fourth = numbers
    if order == "xywh":
        third, fourth = first + third, second + fourth
    x1, y1, x2, y2 = (
        (second, first, fourth, third) if order == "yxyx" else (first, second, third, fourth)
    )
    if not box_format.startswith("rel_"):
        x1, y1, x2, y2 = x1 / width, y1 / height, x2 / width, y2 / height
    return y1, x1, y2, x2


def clip(corners: Sequence[float], slack: float = 1e-3) -> tuple[Corners, str]:
    """The part of a box inside the picture, and what was wrong with it; "" if nothing was.

    No more than `slack` outside is rounding, and not told. Raises DatasetError for a box without
    area in the picture, and for what is no number.
    """
    y1, x1, y2, x2 = (float(value) for value in corners)
    if not all(math.isfinite(value) for value in (y1, x1, y2, x2)):
        raise DatasetError(
            f"the box {_box_layouts_shown(corners)} holds what is no number. Pixels fit."
        )
    if y2 <= y1 or x2 <= x1:
        raise DatasetError(
            f"the box {_box_layouts_shown(corners)} has no area. y1 < y2 and x1 < x2 fit. "
            "Correct it."
        )
    kept = (max(0.0, y1), max(0.0, x1), min(1.0, y2), min(1.0, x2))
    if kept[2] <= kept[0] or kept[3] <= kept[1]:
        raise DatasetError(
            f"the box {_box_layouts_shown(corners)} is outside of the picture. 0 to 1 fits. "
            "Correct it."
        )
    far = max(abs(a - b) for a, b in zip(kept, (y1, x1, y2, x2), strict=True))
    return (
        kept,
        f"the box {_box_layouts_shown(corners)} leaves the picture; clipped" if far > slack else "",
    )


def _box_layouts_shown(corners: Sequence[float]) -> str:
    return "y1 {:.4g}, x1 {:.4g}, y2 {:.4g}, x2 {:.4g}".format(*map(float, corners))


@dataclasses.dataclass(frozen=True)
class Detect:
    """`detect ...` for rows with a list of boxes and a list of labels.

    Attributes:
      classes: what every prompt asks for; labels that are numbers count in it. Without, a prompt
        asks for what is in its picture, and rows without objects are an error.
      boxes, labels: columns, such as those of Hugging Face's COCO-like data sets.
      box_format: order and units of the numbers of a box, see `box_corners`.
    """

    classes: tuple[str, ...] = ()
    image: str = "image"
    boxes: str = "objects.bbox"
    labels: str = "objects.category"
    box_format: str = "xywh"

    @property
    def image_fields(self) -> tuple[str, ...]:
        return (self.image,)

    def __call__(self, row: Row, place: str) -> Record:
        images, width, height = _picture(row, self.image)
        boxes, names = list(column(row, self.boxes)), _labels(row, self.labels, self.classes)
        if len(boxes) != len(names):
            raise DatasetError(
                f"{self.boxes!r} has {len(boxes)} entries and {self.labels!r} {len(names)}. "
                "Equally many fit. Correct the record."
            )
        things = []
        for name, numbers in zip(names, boxes, strict=True):
            try:
                values = [float(value) for value in numbers]
                corners, _ = clip(box_corners(values, self.box_format, width, height))
            except (TypeError, ValueError) as e:
                told = str(e) if isinstance(e, DatasetError) else f"the box {numbers} is none."
                raise DatasetError(f"{self.boxes!r}: {told}") from e
            things.append(Box(name, *corners))
        return _record(images, prompts.detect, self.classes, names, things, place, (width, height))


@dataclasses.dataclass(frozen=True)
class Segment:
    """`segment ...` for rows with a list of masks and a list of labels.

    A mask is a polygon list or run lengths as COCO writes them, or an array of the picture's size.
    The codec runs where rows are read; on the processor in worker processes.
    """

    codec: MaskCodec
    classes: tuple[str, ...] = ()
    image: str = "image"
    masks: str = "objects.segmentation"
    labels: str = "objects.category"

    @property
    def image_fields(self) -> tuple[str, ...]:
        return (self.image,)

    def __call__(self, row: Row, place: str) -> Record:
        images, width, height = _picture(row, self.image)
        names = _labels(row, self.labels, self.classes)
        try:
            masks = [_mask(mask, height, width) for mask in column(row, self.masks)]
            things = encode_masks(self.codec, masks, names)
        except PaliGemmaError as e:
            raise DatasetError(f"{self.masks!r}: {e}") from e
        return _record(images, prompts.segment, self.classes, names, things, place, (width, height))


def _picture(row: Row, name: str) -> tuple[tuple[Any, ...], int, int]:
    try:
        pictures = tuple(load_image(image) for image in images_in(row, name))
    except DatasetError:
        raise
    except PaliGemmaError as e:
        raise DatasetError(str(e)) from e
    if len(pictures) != 1:
        raise DatasetError(f"{name!r} holds {len(pictures)} pictures. One fits where boxes are.")
    return pictures, pictures[0].width, pictures[0].height


def _labels(row: Row, name: str, classes: Sequence[str]) -> list[str]:
    names = []
    for label in column(row, name):
        if isinstance(label, int | np.integer):
            if not 0 <= label < len(classes):
                raise DatasetError(
                    f"{name!r} holds the number {label}, and there are {len(classes)} classes. "
                    "Their names, in order, fit. Give them: Detect(classes=('cat', 'dog'))"
                )
            label = classes[int(label)]
        label = bytes(label).decode("utf-8", "replace") if isinstance(label, bytes) else label
        if classes and label not in classes:
            raise DatasetError(
                f"{name!r} holds {label!r}, which is none of the classes {', '.join(classes)}. "
                "One of them fits. Add it to classes, or correct it."
            )
        names.append(label)
    return names


def _mask(mask: Any, height: int, width: int) -> np.ndarray:
    if isinstance(mask, np.ndarray) and mask.shape[:2] == (height, width):
        return mask.reshape(height, width) > 0
    return mask_from_coco(mask, height, width)


def _record(
    images: tuple[Any, ...], ask: Any, classes: Sequence[str], names: Sequence[str],
    things: Sequence[Box], place: str, size: tuple[int, int],
) -> Record:  # fmt: skip
    asked = list(classes) or list(dict.fromkeys(names))
    if not asked:
        raise DatasetError(
            "there are no objects, so nothing to ask for. Give the classes, and the answer is "
            "empty: classes=('cat', 'dog')"
        )
    try:
        return Record(images, ask(asked), format_answer(things), place, size=size)
    except PaliGemmaError as e:
        raise DatasetError(str(e)) from e
