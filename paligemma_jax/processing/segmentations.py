"""Objects found in one picture, with their masks."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, overload

import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.detections import Detection, Detections
from paligemma_jax.processing.masks import paste
from paligemma_jax.processing.parsing import ParsedAnswer
from paligemma_jax.processing.polygons import Polygon, mask_to_polygons
from paligemma_jax.processing.rle import RLE

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
