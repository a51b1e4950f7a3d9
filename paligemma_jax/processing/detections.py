"""Objects found in one picture, in its own pixels.

How much boxes overlap, and which of those that are alike to keep.

Objects found in one picture, with their masks.
"""

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from paligemma_jax.errors import ConfigError, InvalidPromptError, MissingExtraError
from paligemma_jax.processing.location_tokens import Box, ParsedAnswer, Unparsed, parse_answer
from paligemma_jax.processing.masks import RLE, Polygon, mask_to_polygons, paste

if TYPE_CHECKING:
    from PIL.Image import Image


def intersection_over_union(boxes: Sequence[Box], others: Sequence[Box]) -> np.ndarray:
    """f64[n, m]: shared area over joint area of each pair, in 0..1; 0 for boxes without area."""
    first, second = _corners(boxes)[:, None], _corners(others)[None]
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=-1)
    areas = [np.prod(box[..., 2:] - box[..., :2], axis=-1) for box in (first, second)]
    joint = areas[0] + areas[1] - shared
    return np.where(joint > 0, shared / np.where(joint > 0, joint, 1), 0.0)


def distinct(boxes: Sequence[Box], scores: Sequence[float], iou: float) -> list[int]:
    """Places of the boxes to keep, in their order; see `Detections.nms`."""
    overlaps = intersection_over_union(boxes, boxes)
    corners = _corners(boxes)
    kept: list[int] = []
    for place in sorted(range(len(boxes)), key=lambda i: -scores[i]):  # ties: the first
        rivals = [other for other in kept if boxes[other].label == boxes[place].label]
        equal = (corners[rivals] == corners[place]).all(axis=1).any()
        if not equal and not (overlaps[place, rivals] >= iou).any():
            kept.append(place)
    return sorted(kept)


def _corners(boxes: Sequence[Box]) -> np.ndarray:
    corners = [(box.y1, box.x1, box.y2, box.x2) for box in boxes]
    return np.array(corners, np.float64).reshape(-1, 4)


Corners = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object: `xyxy` is x1, y1, x2, y2 in pixels, `box` the same as fractions of the picture.

    `label` is "" where the model gave none, `score` None where none was asked for.
    """

    label: str
    xyxy: Corners
    box: Box
    score: float | None


@dataclasses.dataclass(frozen=True)
class Detections:
    """Boxes in one picture of `width` x `height` pixels.

    `text` is the answer as it came and `unused` what of it is no object; `scores` are in [0, 1],
    one a box, or None where none were asked for. Iterating gives a Detection each; `found[0]` is
    one, and `found[:3]`, `found[[0, 2]]` and `found[mask of bool]` are Detections again.
    """

    boxes: tuple[Box, ...]
    text: str
    width: int
    height: int
    scores: tuple[float, ...] | None = None
    unused: tuple[Unparsed, ...] = ()

    def __post_init__(self) -> None:
        if self.scores is not None and len(self.scores) != len(self.boxes):
            raise ConfigError(
                f"{len(self.scores)} scores and {len(self.boxes)} boxes do not go together. One "
                "score a box, or None, fits. Make both from one answer: weigh_tokens(...)"
            )

    @classmethod
    def from_text(cls, text: str, width: int, height: int) -> "Detections":
        """Reads every complete box of an answer about a picture of width x height pixels."""
        return cls.from_answer(parse_answer(text), width, height)

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
        return Detections(answer.objects, answer.text, width, height, kept, answer.unused)

    @property
    def labels(self) -> list[str]:
        """The label of each box; "" where the model gave none."""
        return [box.label for box in self.boxes]

    @property
    def xyxy(self) -> np.ndarray:
        """f32[n, 4] corners x1, y1, x2, y2 in pixels."""
        return self.normalised * np.array([self.width, self.height] * 2, np.float32)

    @property
    def normalised(self) -> np.ndarray:
        """f32[n, 4] corners x1, y1, x2, y2 as fractions of the picture's width and height."""
        corners = [(box.x1, box.y1, box.x2, box.y2) for box in self.boxes]
        return np.array(corners, np.float32).reshape(-1, 4)

    def filter(self, min_score: float) -> Self:
        """Those with a score of at least `min_score`; raises ConfigError if there are no scores."""
        if self.scores is None:
            raise ConfigError(
                "These objects have no scores, so none can be told by it. Objects of detect() or "
                "segment() have them; those of from_text() do not."
            )
        return self[[i for i, score in enumerate(self.scores) if score >= min_score]]

    def with_labels(self, labels: Collection[str]) -> Self:
        """Those whose label is one of `labels`."""
        return self[[i for i, label in enumerate(self.labels) if label in labels]]

    def nms(self, iou: float = 0.7) -> Self:
        """Leaves out every box like a better one of the same label: equal, or of so high an IoU.

        The better of two is that of the higher score, or the first. With 1 only equal boxes go; in
        answers that repeat themselves the default seldom takes one of two things for the other.
        Raises ConfigError unless 0 < iou <= 1.
        """
        if not 0 < iou <= 1:
            raise ConfigError(
                f"An overlap (iou) of {iou} is none. More than 0, and at most 1, fits. Call for "
                "example: nms(iou=0.7)"
            )
        scores = [0.0] * len(self) if self.scores is None else self.scores
        return self[distinct(self.boxes, scores, iou)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; boxes in pixels (x1, y1, x2, y2)."""
        return {
            "width": self.width,
            "height": self.height,
            "objects": [self._fields(place) for place in range(len(self))],
            "text": self.text,
            "unused": [dataclasses.asdict(piece) for piece in self.unused],
        }

    def to_coco(self, image_id: int, category_ids: Mapping[str, int]) -> list[dict[str, Any]]:
        """Rows of COCO: bbox is x, y, width, height in pixels; no score where there is none.

        Raises InvalidPromptError, naming every label that `category_ids` has no number for.
        """
        self._check_labels(category_ids)
        return [
            {"image_id": image_id, "category_id": category_ids[box.label]} | self._row(place)
            for place, box in enumerate(self.boxes)
        ]

    def to_supervision(self, classes: Sequence[str] | None = None) -> Any:
        """`supervision.Detections` with confidence, and labels in data["class_name"].

        class_id is the place of the label in `classes`; without, labels are numbered as they come.
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
            mask=self._bool_masks(),
            confidence=None if self.scores is None else np.array(self.scores, np.float32),
            class_id=np.array([names.index(label) for label in self.labels], int),
            data={"class_name": np.array(self.labels, str)},
        )

    def draw(self, image: "Image") -> "Image":
        """A copy of the picture with the objects drawn on it; see `paligemma_jax.viz.draw`."""
        # viz stands above this room and needs its types. Results draw themselves all the same, and
        # who draws nothing loads nothing of it.
        from paligemma_jax.drawing import draw

        return draw(image, self)

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[Detection]:
        return map(self._one, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Detection: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> Self: ...
    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> Detection | Self:
        places = range(len(self))
        if isinstance(index, slice):
            return self._take(places[index])
        if isinstance(index, np.ndarray) and index.dtype == bool:
            return self._take([place for place, kept in zip(places, index, strict=True) if kept])
        if isinstance(index, Sequence | np.ndarray):
            return self._take([places[operator.index(place)] for place in index])
        return self._one(places[operator.index(index)])

    def __str__(self) -> str:
        lines = []
        for found in self:
            score = "" if found.score is None else f" ({found.score:.2f})"
            corners = " ".join(f"{v:.0f}" for v in found.xyxy)
            lines.append(f"{found.label or 'object'}{score}: {corners}")
        return "\n".join(lines) or "nothing found"

    def _one(self, place: int) -> Detection:
        return Detection(*self._values(place))

    def _values(self, place: int) -> tuple[str, Corners, Box, float | None]:
        x1, y1, x2, y2 = (float(v) for v in self.xyxy[place])
        box = self.boxes[place]
        return box.label, (x1, y1, x2, y2), box, None if self.scores is None else self.scores[place]

    def _take(self, places: Sequence[int], **columns: Any) -> Self:
        """`columns` are those of a subclass, already taken."""
        scores = None if self.scores is None else tuple(self.scores[place] for place in places)
        boxes = tuple(self.boxes[place] for place in places)
        return dataclasses.replace(self, boxes=boxes, scores=scores, **columns)

    def _fields(self, place: int) -> dict[str, Any]:
        """One object of `to_dict`."""
        label, corners, _, score = self._values(place)
        fields = {"label": label, "box": [round(v, 1) for v in corners]}
        return fields if score is None else fields | {"score": round(score, 4)}

    def _row(self, place: int) -> dict[str, Any]:
        """One row of `to_coco`, less what only the caller knows."""
        _, (x1, y1, x2, y2), _, score = self._values(place)
        width, height = x2 - x1, y2 - y1
        row = {"bbox": [x1, y1, width, height], "area": width * height}
        return row if score is None else row | {"score": score}

    def _bool_masks(self) -> np.ndarray | None:
        """bool[n, H, W] where there are masks."""
        return None

    def _check_labels(self, known: Collection[str]) -> None:
        others = sorted({label for label in self.labels if label not in known})
        if others:
            raise InvalidPromptError(
                f"The labels {others} are not among {sorted(known)}. Add them, or leave the "
                f"objects out: found.with_labels({sorted(known)})"
            )


Decode = Callable[[np.ndarray], np.ndarray]  # codes i32[n, 16] -> masks f32[n, 64, 64] in 0..1


@dataclasses.dataclass(frozen=True)
class Segmentation(Detection):
    """One object with its mask, kept as run lengths; all views of it are in the picture's pixels.

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
class Segmentations(Detections):
    """`Detections` whose objects have masks: `rles` holds one a box."""

    rles: tuple[RLE, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {(rle.height, rle.width) for rle in self.rles}
        if len(self.rles) != len(self.boxes) or not sizes <= {(self.height, self.width)}:
            raise ConfigError(
                f"{len(self.rles)} masks of {sorted(sizes)} do not go with {len(self.boxes)} boxes "
                f"in a picture of {self.height} x {self.width}. One a box, of that height and "
                "width, fits. Make both with Segmentations.decoded(...)"
            )

    @classmethod
    def decoded(
        cls,
        answer: ParsedAnswer,
        width: int,
        height: int,
        decode: Decode,
        scores: Sequence[float] | None = None,
    ) -> "Segmentations":
        """Of a parsed answer, the codec's `decode` (called once), and a score for each object."""
        places = [i for i, box in enumerate(answer.objects) if box.codes is not None]
        codes = np.array([answer.objects[i].codes for i in places], np.int32).reshape(-1, 16)
        rles = [RLE(height, width, (height * width,))] * len(answer.objects)
        for i, crop in zip(places, decode(codes) if places else (), strict=True):
            box = answer.objects[i]
            corners = (box.y1, box.x1, box.y2, box.x2)
            rles[i] = RLE.from_mask(paste(crop, corners, height, width))
        plain = Detections.from_answer(answer, width, height, scores)
        return cls(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)},
                   rles=tuple(rles))  # fmt: skip

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
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> Self: ...
    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> Detection | Self:
        return super().__getitem__(index)

    def _one(self, place: int) -> Segmentation:
        return Segmentation(*self._values(place), self.rles[place])

    def _take(self, places: Sequence[int], **columns: Any) -> Self:
        return super()._take(places, rles=tuple(self.rles[place] for place in places), **columns)

    def _fields(self, place: int) -> dict[str, Any]:
        polygons = [
            {"exterior": list(map(list, polygon.exterior)),
             "holes": [list(map(list, hole)) for hole in polygon.holes]}
            for polygon in self._one(place).polygons
        ]  # fmt: skip
        masks = {"rle": self.rles[place].to_coco(), "polygons": polygons}
        return super()._fields(place) | masks

    def _row(self, place: int) -> dict[str, Any]:
        rle = self.rles[place]
        return super()._row(place) | {"area": rle.area, "segmentation": rle.to_coco()}

    def _bool_masks(self) -> np.ndarray | None:
        return self.masks
