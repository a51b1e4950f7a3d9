"""Small pictures of examples, with what was found and what is right drawn on them."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from paligemma_jax.errors import PaliGemmaError
from paligemma_jax.evaluation.benchmarks.benchmark import Answer
from paligemma_jax.evaluation.benchmarks.evaluate import Evaluation
from paligemma_jax.evaluation.benchmarks.objects import found_mask
from paligemma_jax.evaluation.benchmarks.records import Example
from paligemma_jax.evaluation.metrics.coco_detection import TrueBoxes
from paligemma_jax.evaluation.metrics.referring_segmentation import ObjectMask
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.image_source import load_image
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.parsing import Box
from paligemma_jax.viz.boxes import draw_boxes
from paligemma_jax.viz.masks import overlay_masks
from paligemma_jax.viz.palette import label_colours

_SIDE = 320  # pixels
_SHOWN = 4  # pictures of one question


def pictures_of(done: Evaluation, example: Example, codec: MaskCodec | None) -> str:
    """HTML of the example's pictures: what was found, and beside it what is right."""
    try:
        images = [load_image(path) for path in example.images[:_SHOWN]]
    except PaliGemmaError as e:
        return f"<p>{html.escape(str(e))}</p>"
    answer = done.benchmark.answer
    if answer is Answer.BOXES:
        objects = done.predictions[example.id].objects or ()
        found = [(one["label"], one["box"], one["score"]) for one in objects]
        truth: TrueBoxes = example.reference
        right = [(label, box, None) for label, box in zip(truth.labels, truth.xyxy, strict=True)]
        images = [_boxes(images[0], found), _boxes(images[0], right)]
    elif answer is Answer.MASK and codec is not None:
        size = example.reference.mask.shape
        text = done.predictions[example.id].text
        images = [
            _mask(images[0], found_mask(text, codec, *size)),
            _mask(images[0], example.reference),
        ]
    words = ["found", "right"] if answer is not Answer.TEXT else [""] * len(images)
    return "".join(_figure(image, word) for image, word in zip(images, words, strict=True))


def _boxes(image: Image.Image, objects: Sequence[tuple[str, Any, float | None]]) -> Image.Image:
    width, height = image.size
    boxes = tuple(
        Box(label, y1 / height, x1 / width, y2 / height, x2 / width)
        for label, (x1, y1, x2, y2), _ in objects
    )
    scores = tuple(score for _, _, score in objects if score is not None)
    kept = scores if len(scores) == len(boxes) and scores else None
    return draw_boxes(image, Detections(boxes, "", width, height, kept))


def _mask(image: Image.Image, found: ObjectMask | None) -> Image.Image:
    if found is None or found.mask.shape != image.size[::-1]:
        return image
    line = max(1, round(min(image.size) / 200))
    return overlay_masks(image, [found.mask], [label_colours(["mask"])["mask"]], line)


def _figure(image: Image.Image, words: str) -> str:
    image = image.copy()
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    code = base64.b64encode(buffer.getvalue()).decode()
    caption = f"<figcaption>{words}</figcaption>" if words else ""
    return (
        f"<figure><img alt='{words or 'picture'}' src='data:image/jpeg;base64,{code}'>"
        f"{caption}</figure>"
    )
