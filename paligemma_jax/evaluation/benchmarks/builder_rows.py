"""Rows as the public builders of tensorflow-datasets prepare them -> the fields of a benchmark.

Columns and splits from big_vision's datasets/ and evaluation settings of its transfers. NLVR2,
MaRVL and OCR-VQA have no public builder; theirs are those that the configurations name.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.data.readers import column, images_in, texts_of
from paligemma_jax.errors import DatasetError, InvalidMaskError
from paligemma_jax.evaluation.benchmarks.benchmark import Row
from paligemma_jax.evaluation.metrics.misfit import Misfit
from paligemma_jax.processing.image_source import ImageSource
from paligemma_jax.processing.mask_source import load_mask
from paligemma_jax.processing.rle import RLE

_PAIR = {"question": "sentence", "answer": "label"}
_KIND = {"type": "question_type"}
_COLUMNS: Mapping[str, Mapping[str, str]] = {  # field of the benchmark -> column of the builder
    "vqav2": {"question": "question_text"},
    "aokvqa-da": {"answers": "direct_answers"},
    "aokvqa-mc": {"choices": "multiple_choice_possible_answers"},
    "ai2d": {"choices": "possible_answers"},
    "nlvr2": _PAIR,
    "marvl": _PAIR,
    "rsvqa-lr": _KIND,
    "rsvqa-hr": _KIND,
    "countbenchqa": {"answer": "number"},
    "cococap": {"captions": "captions.text"},
    "nocaps": {"captions": "texts"},
    "textcaps": {"captions": "texts"},
    "widgetcap": {"captions": "texts"},
    "screen2words": {"captions": "summary"},
    "scicap": {"captions": "caption/lowercase_and_token_and_remove_figure_index"},
}
_TEXTS = ("captions", "answers", "choices")  # fields that are lists
_BOTH = ("image_left", "image_right")


def builder_images(row: Row) -> tuple[ImageSource, ...]:
    """The pictures of a row, two of NLVR2; raises DatasetError."""
    if "image" in row or "images" in row:
        return images_in(row, "image" if "image" in row else "images")
    return images_in(row, _BOTH if _BOTH[0] in row else "image")


def builder_fields(name: str, row: Row, directory: Path, split: str) -> Row:
    """`row` with the fields of the benchmark `name`, as far as a builder's columns tell them.

    The last two directories and the split tell kinds that no column does. Raises Misfit.
    """
    try:
        found: dict[str, Any] = {}
        for field, source in _COLUMNS.get(name, {}).items():
            if source.partition(".")[0] in row and not isinstance(row.get(field), list):
                value = column(row, source)
                found[field] = list(texts_of(value, source)) if field in _TEXTS else value
        found |= _derived(name, row, directory, split)
    except DatasetError as e:
        raise Misfit(str(e)) from e
    return dict(row) | found


def _derived(name: str, row: Row, directory: Path, split: str) -> Row:
    """What takes more than another name."""
    if name == "aokvqa-mc" and "multiple_choice_correct_idx" in row:
        return _chosen(row)
    if name == "scienceqa" and isinstance(row.get("answer"), int):
        return {"answer": chr(ord("A") + row["answer"])}
    if name in ("rsvqa-lr", "rsvqa-hr") and row.get("answers"):
        return {"answer": row["answers"][0]}
    if name == "tallyqa" and "issimple" in row:
        return {"difficulty": "simple" if row["issimple"] == 1 else "complex"}
    if name == "chartqa" and "split" not in row:
        return {"split": directory.parent.name}
    if name == "pope" and "split" not in row:
        return {"split": directory.parent.name.removeprefix("pope_")}
    if name == "xgqa" and "language" not in row:
        return {"language": split.rpartition("_")[2]}
    if name.startswith("refcoco") and "objects" in row:
        return _referred(row)
    return {}


def _chosen(row: Row) -> Row:
    choices, number = row["multiple_choice_possible_answers"], row["multiple_choice_correct_idx"]
    if not 0 <= number < len(choices):
        raise Misfit(f"the right choice is number {number} of {len(choices)}; test data has none")
    return {"answer": choices[number]}


def _referred(row: Row) -> Row:
    """Of a row with one object and one expression, as the splits named _flat have."""
    masks, boxes = list(column(row, "objects.mask")), list(column(row, "objects.bbox"))
    names = [texts_of(one, "sentence") for one in column(row, "objects.refs.sentence")]
    if len(masks) != 1 or len(names[0]) != 1:
        raise Misfit(
            f"there are {len(masks)} objects in a row; one with one expression is measured, as in "
            "the splits validation_flat, testA_flat, ..."
        )
    try:
        with Image.open(io.BytesIO(masks[0])) as image:
            mask = load_mask(np.asarray(image))
    except (OSError, TypeError, InvalidMaskError) as e:
        raise Misfit(f"the mask cannot be read: {e}") from e
    height, width = mask.shape
    y1, x1, y2, x2 = (float(value) for value in boxes[0])
    return {
        "expression": names[0][0],
        "segmentation": RLE.from_mask(mask).to_coco(),
        "size": [height, width],
        "box": [x1 * width, y1 * height, x2 * width, y2 * height],
        "objects": None,
        "question_id": int(column(row, "objects.refs.id")[0][0]),
    }
