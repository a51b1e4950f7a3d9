"""detect and segment: objects as lines, as JSON, and drawn on the images."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.files import DrawingFiles, Input, MaskFiles, check_arguments
from paligemma_jax.cli.output import Shown, run_on_images
from paligemma_jax.cli.text_commands import split_labels
from paligemma_jax.errors import PaliGemmaError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from paligemma_jax.pipeline import Pipeline
    from paligemma_jax.processing.detections import Detections, Segmentations

_DETECT = """\
Examples:
  paligemma detect photo.jpg cat
  paligemma detect photo.jpg "cat ; dog" --out boxes.png --min-score 0.5
  paligemma detect *.jpg person --out boxes/ --json > boxes.jsonl
  paligemma detect photo.jpg cat --attention-map attention.png

A line is: label (score): x1 y1 x2 y2, in pixels of the image, from its top left corner. The score
is the model's confidence, from 0 to 1. "nothing found" is a result too (exit code 0). Results have
no other labels than those asked for; for what a model says freely: paligemma generate.
"""
_SEGMENT = """\
Examples:
  paligemma segment photo.jpg cat --out masks.png
  paligemma segment photo.jpg "cat ; dog" --masks masks/       a file for each object
  paligemma segment *.jpg person --json > people.jsonl         run lengths and polygons
  paligemma segment photo.jpg cat --model pt-224.npz --mask-codec vae-oid.npz

A line is: label (score): x1 y1 x2 y2, as paligemma detect prints it. JSON has the mask of each
object as COCO run lengths (rle) and as polygons, in pixels of the image. Files of --masks have 255
in the object and 0 elsewhere, and are as large as the image.
"""
_FIELDS = "text, width, height, objects (label, box, score{}), unparsed, out"


def add_detect(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands, "detect", run_detect, "detect objects, with boxes",
        "Detects objects of one or several kinds in each image.", _DETECT,
        json=options.json_lines(_FIELDS.format("") + ", attention_map"),
    )  # fmt: skip
    _add_objects(parser, "boxes")
    parser.add_argument(
        "--attention-map", metavar="PATH",
        help="draw where the model attends for each box, in the order of the lines: an image file, "
        "or for several images a directory",
    )  # fmt: skip
    options.add_model(parser)


def add_segment(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands, "segment", run_segment, "segment objects, with masks",
        "Segments objects of one or several kinds in each image.", _SEGMENT,
        json=options.json_lines(_FIELDS.format(", rle, polygons, mask")),
    )  # fmt: skip
    _add_objects(parser, "masks and boxes")
    parser.add_argument(
        MaskFiles.option, metavar="DIR",
        help="write each mask to a file of its own, such as DIR/photo-1-cat.png",
    )  # fmt: skip
    options.add_model(parser, mask_codec=True)


def _add_objects(parser: argparse.ArgumentParser, drawn: str) -> None:
    options.add_images(parser, ("labels", 'what to find, after all images: "cat ; dog"'))
    parser.add_argument(
        "--out", metavar="PATH",
        help=f"draw the {drawn}: an image file, or for several images a directory",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--min-score", type=options.fraction, default=0.0, metavar="S",
        help="only objects with at least this score, from 0 to 1 (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--nms-iou", type=options.positive_fraction, metavar="IOU",
        help="non-maximum suppression: of objects of one label whose boxes overlap by at least "
        "IOU (0.7 is usual) keep the highest-scoring (default: off)",
    )  # fmt: skip
    parser.add_argument(
        "--max-objects", type=options.at_least(1), metavar="N",
        help="maximum number of objects per image (default: 100)",
    )  # fmt: skip
    options.add_max_new_tokens(parser, 512)


def run_detect(args: argparse.Namespace) -> int:
    """`paligemma detect`; returns the exit code."""
    from paligemma_jax.processing import prompts

    check_arguments(args, "labels")
    labels = split_labels(args.labels)
    prompt = prompts.detect(labels)
    drawings = DrawingFiles(args.out, args.images, option="--out", force=args.force)
    map_files = DrawingFiles(
        args.attention_map, args.images, option="--attention-map", force=args.force
    )
    for path in set(drawings.paths.values()) & set(map_files.paths.values()):
        raise PaliGemmaError(f"{path} would be written twice. Choose another {map_files.option}")
    maps: dict[int, np.ndarray] = {}

    def ask(pipeline: "Pipeline", inputs: list[Input]) -> "list[Detections]":
        images = [one.images[0] for one in inputs]
        found = pipeline.detect_batch(images, labels, **_settings(args))
        chosen = [_select(detections, args) for detections in found]
        if map_files.paths:
            seen = box_attention_maps(pipeline, images, prompt, [one.text for one in found])
            for one, indices, of_image in zip(inputs, chosen, seen, strict=True):
                maps[one.index] = of_image[indices]
        return [one[indices] for one, indices in zip(found, chosen, strict=True)]

    def show(one: Input, found: "Detections") -> Shown:
        fields: dict[str, Any] = {"text": found.text} | found.to_dict()
        if drawings.paths:
            fields["out"] = drawings.save(one.name, found.draw(one.images[0]))
        if map_files.paths:
            from paligemma_jax.viz.attention_maps import draw_attention_maps

            titles = [f"{box.label or 'object'} ({box.score:.2f})" for box in found]
            sheet = draw_attention_maps(one.images[0], maps.pop(one.index), titles)
            fields["attention_map"] = map_files.save(one.name, sheet)
        return str(found), fields

    return run_on_images(args, prompt, ask, show)


def run_segment(args: argparse.Namespace) -> int:
    """`paligemma segment`; returns the exit code."""
    from paligemma_jax.processing import prompts

    check_arguments(args, "labels")
    labels = split_labels(args.labels)
    drawings = DrawingFiles(args.out, args.images, option="--out", force=args.force)
    masks = None
    if args.masks is not None:
        taken = drawings.paths.values()
        masks = MaskFiles(args.masks, args.images, force=args.force, taken=taken)

    def ask(pipeline: "Pipeline", inputs: list[Input]) -> "list[Segmentations]":
        images = [one.images[0] for one in inputs]
        found = pipeline.segment_batch(images, labels, **_settings(args))
        return [one[_select(one, args)] for one in found]

    def show(one: Input, found: "Segmentations") -> Shown:
        fields: dict[str, Any] = {"text": found.text} | found.to_dict()
        if drawings.paths:
            fields["out"] = drawings.save(one.name, found.draw(one.images[0]))
        if masks is not None:
            for of_object, path in zip(fields["objects"], masks.save(one.name, found), strict=True):
                of_object["mask"] = path
        return str(found), fields

    return run_on_images(args, prompts.segment(labels), ask, show)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `detect_batch` and `segment_batch`."""
    settings = options.generation_options(args) | {"batch_size": args.batch_size}
    return settings if args.max_objects is None else settings | {"max_objects": args.max_objects}


def _select(found: "Detections", args: argparse.Namespace) -> list[int]:
    """Indices of the objects to show: with the score asked for, and after NMS."""
    from paligemma_jax.processing.detections import nms

    scores = found.scores or (0.0,) * len(found)
    indices = [i for i, score in enumerate(scores) if score >= args.min_score]
    if args.nms_iou is not None:
        boxes = [found.boxes[i] for i in indices]
        indices = [indices[i] for i in nms(boxes, [scores[i] for i in indices], args.nms_iou)]
    return indices


def box_attention_maps(
    pipeline: "Pipeline", images: "Sequence[Image.Image]", prompt: str, texts: Sequence[str]
) -> "list[np.ndarray]":
    """For each image f32[n, 1, g, g]: attention to its patches for each of the n boxes in its text.

    That is the mean of the maps of the four location tokens; see `image_attention_maps`.
    """
    import numpy as np

    from paligemma_jax.generation.attention_maps import image_attention_maps
    from paligemma_jax.processing.location_tokens import parse_tokens

    tokenizer = pipeline.processor.tokenizer
    tokens = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    batch = pipeline.processor(list(images), [prompt] * len(images))
    result = []
    for ids, maps in zip(tokens, image_attention_maps(pipeline.model, batch, tokens), strict=True):
        locations = [place.locations for place in parse_tokens(ids, tokenizer).tokens]
        result.append(maps[np.array(locations, int).reshape(-1, 4)].mean(axis=1))
    return result
