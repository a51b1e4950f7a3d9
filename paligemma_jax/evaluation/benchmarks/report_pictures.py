"""Small pictures of examples, with what was found and what is right drawn on them."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.errors import PaliGemmaError
from paligemma_jax.evaluation.benchmarks.benchmark import Answer
from paligemma_jax.evaluation.benchmarks.evaluate import Evaluation, right_answer
from paligemma_jax.evaluation.benchmarks.example import Example, open_picture
from paligemma_jax.evaluation.benchmarks.objects import found_mask, found_masks
from paligemma_jax.evaluation.metrics.coco_detection import TrueBoxes
from paligemma_jax.processing.detections import Detections
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
        images = [open_picture(picture) for picture in example.images[:_SHOWN]]
    except PaliGemmaError as e:
        return f"<p>{html.escape(str(e))}</p>"
    answer = example.answer or done.benchmark.answer
    made, right = done.predictions[example.id], right_answer(example)
    if answer is Answer.BOXES:
        found = [(one["label"], one["box"], one["score"]) for one in made.objects or ()]
        truth: TrueBoxes = right
        boxes = [(label, box, None) for label, box in zip(truth.labels, truth.xyxy, strict=True)]
        images = [_boxes(images[0], found), _boxes(images[0], boxes)]
    elif answer is Answer.MASK and codec is not None:
        one = found_mask(made.text, codec, *right.mask.shape)
        images = [
            _masks(images[0], () if one is None else [one.mask]), _masks(images[0], [right.mask])
        ]  # fmt: skip
    elif answer is Answer.MASKS and codec is not None:
        masks = found_masks(made.text, codec, *right.shape[1:])
        images = [_masks(images[0], masks), _masks(images[0], right)]
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


def _masks(image: Image.Image, masks: Sequence[np.ndarray] | np.ndarray) -> Image.Image:
    fitting = [mask for mask in masks if mask.shape == image.size[::-1]]
    if not fitting:
        return image
    line = max(1, round(min(image.size) / 200))
    colour = label_colours(["mask"])["mask"]
    return overlay_masks(image, fitting, [colour] * len(fitting), line)


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
