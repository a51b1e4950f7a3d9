"""Objects found in one image, in its own pixels, with or without masks: results and exports."""

import dataclasses
import operator
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Self, overload

import numpy as np
from PIL import Image

from paligemma_jax.drawing import draw_objects
from paligemma_jax.errors import (
    ConfigError,
    InvalidImageError,
    InvalidPromptError,
    MissingExtraError,
)
from paligemma_jax.processing.location_tokens import Box, ParsedAnswer, Unparsed, parse_answer
from paligemma_jax.processing.masks import RLE, Polygon, mask_to_polygons, paste

Corners = tuple[float, float, float, float]
Index = slice | Sequence[int] | np.ndarray
Font = str | os.PathLike[str]
Decode = Callable[[np.ndarray], np.ndarray]  # codes i32[n, 16] -> masks f32[n, 64, 64] in 0..1


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object: `xyxy` is x1, y1, x2, y2 in pixels, `box` the same as fractions of the image.

    `label` is "" where the model gave none, `score` None where none was asked for.
    """

    label: str
    xyxy: Corners
    box: Box
    score: float | None


@dataclasses.dataclass(frozen=True)
class Segmentation(Detection):
    """One object with its mask, run-length encoded; all views of it are in the image's pixels.

    The mask is empty where the model gave a box alone.
    """

    rle: RLE

    @property
    def mask(self) -> np.ndarray:
        """bool[H, W]."""
        return self.rle.to_mask()

    @property
    def polygons(self) -> tuple[Polygon, ...]:
        """Outlines of the mask, one for each connected area of it, with its holes."""
        return mask_to_polygons(self.mask)


@dataclasses.dataclass(frozen=True)
class Detections:
    """Boxes in one image of `width` x `height` pixels.

    `text` is the answer as it came and `unparsed` what of it is no object; `scores` are in [0, 1],
    one a box, or None where none were asked for. Iterating gives a Detection each; `found[0]` is
    one, and `found[:3]`, `found[[0, 2]]` and `found[mask of bool]` are Detections again.
    """

    boxes: tuple[Box, ...]
    text: str
    width: int
    height: int
    scores: tuple[float, ...] | None = None
    unparsed: tuple[Unparsed, ...] = ()

    def __post_init__(self) -> None:
        if self.scores is not None and len(self.scores) != len(self.boxes):
            raise ConfigError(
                f"Expected a score for each of {len(self.boxes)} boxes, or None; got "
                f"{len(self.scores)} scores."
            )

    @classmethod
    def from_text(cls, text: str, width: int, height: int) -> "Detections":
        """Parses every complete box of an answer about an image of width x height pixels."""
        return Detections.from_answer(parse_answer(text), width, height)

    @classmethod
    def from_answer(
        cls,
        answer: ParsedAnswer,
        width: int,
        height: int,
        scores: Sequence[float] | None = None,
    ) -> "Detections":
        """Of a parsed answer and a score for each of its objects."""
        kept = None if scores is None else tuple(float(score) for score in scores)
        return Detections(answer.objects, answer.text, width, height, kept, answer.unparsed)

    @property
    def labels(self) -> list[str]:
        """The label of each box; "" where the model gave none."""
        return [box.label for box in self.boxes]

    @property
    def xyxy(self) -> np.ndarray:
        """f32[n, 4] corners x1, y1, x2, y2 in pixels."""
        return self.normalized * np.array([self.width, self.height] * 2, np.float32)

    @property
    def normalized(self) -> np.ndarray:
        """f32[n, 4] corners x1, y1, x2, y2 as fractions of the image's width and height."""
        return _corners(self.boxes).astype(np.float32)

    def filter(self, min_score: float) -> Self:
        """Those with a score of at least `min_score`; raises ConfigError if there are no scores."""
        if self.scores is None:
            raise ConfigError(
                "Expected objects with scores, as detect() and segment() give them, got some "
                "without, as from_text() gives them."
            )
        return self[[i for i, score in enumerate(self.scores) if score >= min_score]]

    def with_labels(self, labels: Collection[str]) -> Self:
        """Those whose label is one of `labels`."""
        return self[[i for i, label in enumerate(self.labels) if label in labels]]

    def nms(self, iou: float = 0.7) -> Self:
        """Non-maximum suppression: drops every box that overlaps a better one of its label.

        The better of two is that of the higher score, or the first. Boxes overlap if they are equal
        or of at least so high an IoU: with 1 only equal boxes go. Raises ConfigError unless
        0 < iou <= 1.
        """
        scores = [0.0] * len(self) if self.scores is None else self.scores
        return self[nms(self.boxes, scores, iou)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; boxes in pixels (x1, y1, x2, y2)."""
        return {
            "width": self.width,
            "height": self.height,
            "objects": [self._to_dict(index) for index in range(len(self))],
            "text": self.text,
            "unparsed": [dataclasses.asdict(part) for part in self.unparsed],
        }

    def to_coco(self, image_id: int, category_ids: Mapping[str, int]) -> list[dict[str, Any]]:
        """Annotations of COCO: bbox is x, y, width, height in pixels; no score where there is none.

        Raises InvalidPromptError, naming every label that `category_ids` has no number for.
        """
        self._check_labels(category_ids)
        return [
            {"image_id": image_id, "category_id": category_ids[box.label]} | self._to_coco(index)
            for index, box in enumerate(self.boxes)
        ]

    def to_supervision(self, classes: Sequence[str] | None = None) -> Any:
        """`supervision.Detections` with confidence, and labels in data["class_name"].

        class_id is the index of the label in `classes`; without, labels are numbered as they come.
        Raises MissingExtraError without supervision, InvalidPromptError for other labels.
        """
        try:
            import supervision
        except ImportError as e:
            raise MissingExtraError("Conversion to supervision", "supervision") from e
        names = list(dict.fromkeys(self.labels)) if classes is None else list(classes)
        self._check_labels(names)
        return supervision.Detections(
            xyxy=self.xyxy,
            mask=self._masks(),
            confidence=None if self.scores is None else np.array(self.scores, np.float32),
            class_id=np.array([names.index(label) for label in self.labels], int),
            data={"class_name": np.array(self.labels, str)},
        )

    def draw(self, image: Image.Image) -> Image.Image:
        """A copy of the image with the objects drawn on it; see `paligemma_jax.draw`."""
        return draw(image, self)

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[Detection]:
        return map(self._one, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Detection: ...
    @overload
    def __getitem__(self, index: Index) -> Self: ...
    def __getitem__(self, index: int | Index) -> Detection | Self:
        everything = range(len(self))
        if isinstance(index, slice):
            return self._take(everything[index])
        if isinstance(index, np.ndarray) and index.dtype == bool:
            return self._take([i for i, kept in zip(everything, index, strict=True) if kept])
        if isinstance(index, Sequence | np.ndarray):
            return self._take([everything[operator.index(i)] for i in index])
        return self._one(everything[operator.index(index)])

    def __str__(self) -> str:
        lines = []
        for found in self:
            score = "" if found.score is None else f" ({found.score:.2f})"
            corners = " ".join(f"{v:.0f}" for v in found.xyxy)
            lines.append(f"{found.label or 'object'}{score}: {corners}")
        return "\n".join(lines) or "nothing found"

    def _one(self, index: int) -> Detection:
        return Detection(*self._fields(index))

    def _fields(self, index: int) -> tuple[str, Corners, Box, float | None]:
        x1, y1, x2, y2 = (float(v) for v in self.xyxy[index])
        box = self.boxes[index]
        return box.label, (x1, y1, x2, y2), box, None if self.scores is None else self.scores[index]

    def _take(self, indices: Sequence[int], **columns: Any) -> Self:
        """`columns` are those of a subclass, already taken."""
        scores = None if self.scores is None else tuple(self.scores[i] for i in indices)
        boxes = tuple(self.boxes[i] for i in indices)
        return dataclasses.replace(self, boxes=boxes, scores=scores, **columns)

    def _to_dict(self, index: int) -> dict[str, Any]:
        """One object of `to_dict`."""
        label, corners, _, score = self._fields(index)
        fields = {"label": label, "box": [round(v, 1) for v in corners]}
        return fields if score is None else fields | {"score": round(score, 4)}

    def _to_coco(self, index: int) -> dict[str, Any]:
        """One annotation of `to_coco`, less what only the caller knows."""
        _, (x1, y1, x2, y2), _, score = self._fields(index)
        width, height = x2 - x1, y2 - y1
        annotation = {"bbox": [x1, y1, width, height], "area": width * height}
        return annotation if score is None else annotation | {"score": score}

    def _masks(self) -> np.ndarray | None:
        """bool[n, H, W] where there are masks."""
        return None

    def _check_labels(self, known: Collection[str]) -> None:
        others = sorted({label for label in self.labels if label not in known})
        if others:
            raise InvalidPromptError(
                f"Expected labels among {sorted(known)}, got {others}. Add them, or leave the "
                f"objects out: found.with_labels({sorted(known)})"
            )


@dataclasses.dataclass(frozen=True)
class Segmentations(Detections):
    """`Detections` whose objects have masks: `rles` holds one a box."""

    rles: tuple[RLE, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {(rle.height, rle.width) for rle in self.rles}
        if len(self.rles) != len(self.boxes) or not sizes <= {(self.height, self.width)}:
            raise ConfigError(
                f"Expected masks of {self.height} x {self.width} pixels for {len(self.boxes)} "
                f"boxes, got {len(self.rles)} masks of {sorted(sizes)}. Make both with "
                "Segmentations.decode(...)"
            )

    @classmethod
    def decode(
        cls,
        answer: ParsedAnswer,
        width: int,
        height: int,
        decode: Decode,
        scores: Sequence[float] | None = None,
    ) -> "Segmentations":
        """Of a parsed answer, the codec's `decode` (called once), and a score for each object."""
        masked = [i for i, box in enumerate(answer.objects) if box.codes is not None]
        codes = np.array([answer.objects[i].codes for i in masked], np.int32).reshape(-1, 16)
        rles = [RLE(height, width, (height * width,))] * len(answer.objects)
        for i, crop in zip(masked, decode(codes) if masked else (), strict=True):
            box = answer.objects[i]
            corners = (box.y1, box.x1, box.y2, box.x2)
            rles[i] = RLE.from_mask(paste(crop, corners, height, width))
        plain = Detections.from_answer(answer, width, height, scores)
        return cls(**vars(plain), rles=tuple(rles))

    @property
    def masks(self) -> np.ndarray:
        """bool[n, H, W]."""
        masks = [rle.to_mask() for rle in self.rles]
        return np.array(masks, bool).reshape(-1, self.height, self.width)

    def __iter__(self) -> Iterator[Segmentation]:
        return map(self._one, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Segmentation: ...
    @overload
    def __getitem__(self, index: Index) -> Self: ...
    def __getitem__(self, index: int | Index) -> Detection | Self:
        return super().__getitem__(index)

    def _one(self, index: int) -> Segmentation:
        return Segmentation(*self._fields(index), self.rles[index])

    def _take(self, indices: Sequence[int], **columns: Any) -> Self:
        return super()._take(indices, rles=tuple(self.rles[i] for i in indices), **columns)

    def _to_dict(self, index: int) -> dict[str, Any]:
        polygons = [
            {"exterior": list(map(list, polygon.exterior)),
             "holes": [list(map(list, hole)) for hole in polygon.holes]}
            for polygon in self._one(index).polygons
        ]  # fmt: skip
        masks = {"rle": self.rles[index].to_coco(), "polygons": polygons}
        return super()._to_dict(index) | masks

    def _to_coco(self, index: int) -> dict[str, Any]:
        rle = self.rles[index]
        return super()._to_coco(index) | {"area": rle.area, "segmentation": rle.to_coco()}

    def _masks(self) -> np.ndarray | None:
        return self.masks


def draw(image: Image.Image, found: Detections, *, font: Font | None = None) -> Image.Image:
    """A copy of the image with masks, boxes, labels and scores, in one color a label.

    `font` is a TrueType file for labels beyond ASCII. Raises InvalidImageError if the image is not
    of the size that the objects were found in.
    """
    masks = [rle.to_mask() for rle in found.rles] if isinstance(found, Segmentations) else None
    _check_size(image, found)
    return draw_objects(image, found.xyxy, found.labels, found.scores, masks, font=font)


def draw_boxes(image: Image.Image, found: Detections, *, font: Font | None = None) -> Image.Image:
    """`draw` without masks."""
    _check_size(image, found)
    return draw_objects(image, found.xyxy, found.labels, found.scores, font=font)


def _check_size(image: Image.Image, found: Detections) -> None:
    if image.size != (found.width, found.height):
        raise InvalidImageError(
            f"Expected the image that the objects were found in, {found.width} x {found.height} "
            f"pixels, got one of {image.width} x {image.height}. Open it with: load_image(...)"
        )


def intersection_over_union(boxes: Sequence[Box], others: Sequence[Box]) -> np.ndarray:
    """f64[n, m]: shared area over joint area of each pair, in 0..1; 0 for boxes without area."""
    first, second = _corners(boxes)[:, None], _corners(others)[None]
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=-1)
    areas = [np.prod(box[..., 2:] - box[..., :2], axis=-1) for box in (first, second)]
    joint = areas[0] + areas[1] - shared
    return np.where(joint > 0, shared / np.where(joint > 0, joint, 1), 0.0)


def nms(boxes: Sequence[Box], scores: Sequence[float], iou: float) -> list[int]:
    """Indices of the boxes to keep, in their order; see `Detections.nms`."""
    if not 0 < iou <= 1:
        raise ConfigError(f"Expected an IoU above 0 and at most 1, got {iou}. Call nms(iou=0.7)")
    overlaps = intersection_over_union(boxes, boxes)
    corners = _corners(boxes)
    kept: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i]):  # ties: the first
        rivals = [other for other in kept if boxes[other].label == boxes[index].label]
        equal = (corners[rivals] == corners[index]).all(axis=1).any()
        if not equal and not (overlaps[index, rivals] >= iou).any():
            kept.append(index)
    return sorted(kept)


def _corners(boxes: Sequence[Box]) -> np.ndarray:
    """f64[n, 4] x1, y1, x2, y2."""
    corners = [(box.x1, box.y1, box.x2, box.y2) for box in boxes]
    return np.array(corners, np.float64).reshape(-1, 4)
