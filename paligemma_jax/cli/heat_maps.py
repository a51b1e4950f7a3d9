"""Where a model looked for each box it found: one sheet a picture."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma_jax.cli.picture_files import plan_targets, save_picture
from paligemma_jax.errors import PaliGemmaError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from paligemma_jax.pipeline import Pipeline
    from paligemma_jax.processing.detections import Detections

OPTION = "--heat-map"


def plan(args: argparse.Namespace, taken: Mapping[str, Path]) -> dict[str, Path]:
    """The file to write for each picture; `taken` are others that the command writes.

    Raises PaliGemmaError before any work is done if one could not be written.
    """
    targets = plan_targets(args.heat_map, args.pictures, force=args.force, option=OPTION)
    for path in targets.values():
        if path in taken.values():
            raise PaliGemmaError(
                f"{path} would be written twice. Different names fit. Choose another {OPTION}."
            )
    return targets


def looked_at(
    pipeline: "Pipeline", images: "Sequence[Image.Image]", prompt: str, answers: Sequence[str]
) -> "list[np.ndarray]":
    """For each picture f32[n, 1, g, g]: where its answer's n objects were looked for.

    That is the mean of the four location tokens' maps; see `attention_to_image`.
    """
    import numpy as np

    from paligemma_jax.generation.attention_to_image import attention_to_image
    from paligemma_jax.processing.answer_tokens import parse_tokens

    tokenizer = pipeline.processor.tokenizer
    tokens = [[*tokenizer.encode(answer), tokenizer.eos_id] for answer in answers]
    batch = pipeline.processor(list(images), [prompt] * len(images))
    found = []
    for row, maps in zip(tokens, attention_to_image(pipeline.model, batch, tokens), strict=True):
        places = [place.locations for place in parse_tokens(row, tokenizer).places]
        boxes = np.array(places, int).reshape(-1, 4)
        found.append(maps[boxes].mean(axis=1))
    return found


def save(
    image: "Image.Image", found: "Detections", maps: "np.ndarray", target: Path, *, force: bool
) -> None:
    """Writes the sheet of one picture; raises PaliGemmaError."""
    from paligemma_jax.viz.heat_map import draw_heat_maps

    words = [f"{one.label or 'object'} ({one.score:.2f})" for one in found]
    save_picture(draw_heat_maps(image, maps, words), target, force=force, option=OPTION)
