"""Results drawn on the picture they were found in."""

import os

from PIL import Image, ImageDraw

from paligemma_jax.errors import InvalidImageError
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.segmentations import Segmentations
from paligemma_jax.viz.masks import overlay_masks
from paligemma_jax.viz.palette import label_colours
from paligemma_jax.viz.tags import TagWriter

_LINE_SHARE = 200  # of the picture's shorter side


def draw(
    image: Image.Image,
    found: Detections | Segmentations,
    *,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """A copy of the picture with masks, boxes, labels and scores, in one colour a label.

    `font` is a TrueType file for labels beyond ASCII. Raises InvalidImageError if the picture is
    not of the size that the objects were found in.
    """
    if not isinstance(found, Segmentations):
        return draw_boxes(image, found, font=font)
    _check_size(image, found)
    colours = label_colours(found.labels)
    masks = [rle.to_mask() for rle in found.rles]
    line = _line(image)
    veiled = overlay_masks(image, masks, [colours[label] for label in found.labels], line)
    return draw_boxes(veiled, found, font=font)


def draw_boxes(
    image: Image.Image, detections: Detections, *, font: str | os.PathLike[str] | None = None
) -> Image.Image:
    """`draw` without masks."""
    _check_size(image, detections)
    drawn = image.convert("RGB") if image.mode != "RGB" else image.copy()
    draw = ImageDraw.Draw(drawn)
    line = _line(image)
    halo = max(1, line // 3)
    colours = label_colours(detections.labels)
    # Small boxes over large ones, which would hide them.
    found = sorted(detections, key=lambda one: -_area(one.xyxy))
    for one in found:
        x1, y1, x2, y2 = one.xyxy
        # White around the colour keeps the outline visible on any background.
        around = (x1 - halo, y1 - halo, x2 + halo, y2 + halo)
        draw.rectangle(around, outline="white", width=line + 2 * halo)
        draw.rectangle(one.xyxy, outline=colours[one.label], width=line)
    tags = TagWriter(draw, font)
    for one in found:
        score = "" if one.score is None else f"{one.score:.2f}"
        texts = [text for text in (f"{one.label} {score}".strip(), one.label or score) if text]
        if texts:
            tags.write(texts, one.xyxy, colours[one.label])
    return drawn


def _line(image: Image.Image) -> int:
    return max(1, round(min(image.size) / _LINE_SHARE))


def _area(xyxy: tuple[float, float, float, float]) -> float:
    return (xyxy[2] - xyxy[0]) * (xyxy[3] - xyxy[1])


def _check_size(image: Image.Image, found: Detections) -> None:
    if image.size != (found.width, found.height):
        raise InvalidImageError(
            f"The picture is {image.width} x {image.height}, and the objects were found in one of "
            f"{found.width} x {found.height} pixels. The same picture fits. Open it with: "
            "load_image(...)"
        )
