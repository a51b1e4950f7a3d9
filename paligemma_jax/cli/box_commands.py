"""`paligemma detect`: boxes as text, as JSON, and drawn on the pictures.

What `detect` and `segment` share: labels, options, and objects as lines, JSON and pictures.

Where a model looked for each box it found: one sheet a picture.

`paligemma segment`: boxes and masks as text, as JSON, drawn, and as files.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import files as mask_files
from paligemma_jax.cli import options
from paligemma_jax.cli.files import (
    OUT,
    MaskFiles,
    Picture,
    check_arguments,
    plan_targets,
    save_picture,
)
from paligemma_jax.cli.output import Answered, Shown, report_each
from paligemma_jax.errors import PaliGemmaError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from paligemma_jax.pipeline import Pipeline
    from paligemma_jax.processing.detections import Detections, Segmentations


FIELDS = "answer, width, height, objects (label, box, score), unparsed, out"


def add_objects(parser: argparse.ArgumentParser, what: str, fields: str = FIELDS) -> None:
    """Pictures, labels and options; `what` is drawn, such as "the boxes"."""
    options.add_pictures(parser)
    parser.add_argument(
        "labels", metavar="LABELS", help='what to find, after all pictures: "cat ; dog"'
    )
    parser.add_argument(
        OUT,
        metavar="PATH",
        help=f"draw {what}: a picture file, or for several pictures a directory",
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--min-score",
        type=options.share,
        default=0.0,
        metavar="S",
        help="leave out what the model is less sure of, from 0 to 1 (default: all is shown)",
    )
    parser.add_argument(
        "--max-overlap",
        type=options.overlap,
        metavar="IOU",
        help="of objects of one label that share so much of their boxes (above 0, up to 1; 0.7 is "
        "usual) keep the surest (default: all are shown)",
    )
    parser.add_argument(
        "--max-objects",
        type=options.positive(1000),
        default=options.MAX_OBJECTS,
        metavar="N",
        help="found in a picture at most (default: %(default)s)",
    )
    options.add_answering(parser, fields, options.MAX_OBJECT_TOKENS)


def labels_of(args: argparse.Namespace) -> list[str]:
    """What to find."""
    return [label.strip() for label in args.labels.split(";") if label.strip()]


def limits(args: argparse.Namespace) -> dict[str, int]:
    """Arguments of `detect_batch` and `segment_batch`."""
    names = ("max_objects", "max_new_tokens", "batch_size")
    return {name: getattr(args, name) for name in names}


def plan_drawings(args: argparse.Namespace) -> dict[str, Path]:
    """The file to draw each picture's objects to; raises PaliGemmaError before any work is done."""
    return plan_targets(args.out, args.pictures, force=args.force)


def places_to_show(found: "Detections", args: argparse.Namespace) -> list[int]:
    """Places of the objects that the user wants to see: sure enough, and no duplicates."""
    from paligemma_jax.processing.detections import nms

    scores = found.scores or (0.0,) * len(found)
    places = [i for i, score in enumerate(scores) if score >= args.min_score]
    if args.max_overlap is not None:
        boxes = [found.boxes[i] for i in places]
        kept = nms(boxes, [scores[i] for i in places], args.max_overlap)
        places = [places[i] for i in kept]
    return places


def draw_objects(
    found: "Detections", image: "Image.Image", target: Path | None, args: argparse.Namespace
) -> dict[str, Any]:
    """Draws them where that is asked for, and returns the JSON document's fields.

    Raises PaliGemmaError if the picture cannot be written.
    """
    fields = found.to_dict()
    document = {"answer": fields.pop("text"), **fields}
    if target is not None:
        save_picture(found.draw(image), target, force=args.force)
        document["out"] = str(target)
    return document


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

    That is the mean of the four location tokens' maps; see `image_attention_maps`.
    """
    import numpy as np

    from paligemma_jax.generation.attention_maps import image_attention_maps
    from paligemma_jax.processing.location_tokens import parse_tokens

    tokenizer = pipeline.processor.tokenizer
    tokens = [[*tokenizer.encode(answer), tokenizer.eos_id] for answer in answers]
    batch = pipeline.processor(list(images), [prompt] * len(images))
    found = []
    for row, maps in zip(tokens, image_attention_maps(pipeline.model, batch, tokens), strict=True):
        places = [place.locations for place in parse_tokens(row, tokenizer).tokens]
        boxes = np.array(places, int).reshape(-1, 4)
        found.append(maps[boxes].mean(axis=1))
    return found


def save(
    image: "Image.Image", found: "Detections", maps: "np.ndarray", target: Path, *, force: bool
) -> None:
    """Writes the sheet of one picture; raises PaliGemmaError."""
    from paligemma_jax.viz.attention_maps import draw_attention_maps

    words = [f"{one.label or 'object'} ({one.score:.2f})" for one in found]
    save_picture(draw_attention_maps(image, maps, words), target, force=force, option=OPTION)


_detect_EPILOG = """\
Examples:
  paligemma detect photo.jpg cat
  paligemma detect photo.jpg "cat ; dog" --out boxes.png --min-score 0.5
  paligemma detect *.jpg person --out boxes/ --json > boxes.jsonl
  paligemma detect photo.jpg cat --heat-map looked-at.png

A line is: label (score): x1 y1 x2 y2, in pixels of the picture, from its top left corner. The score
is how sure the model is, from 0 to 1. "nothing found" is an answer too (exit code 0). Answers have
no other labels than those asked for; what a model says freely: paligemma generate.
"""


@dataclasses.dataclass(frozen=True)
class _Found:
    """Boxes in a picture, and what was looked at for each where that was asked for."""

    objects: "Detections"
    maps: "np.ndarray | None" = None

    @property
    def text(self) -> str:
        return self.objects.text

    def take(self, places: list[int]) -> "_Found":
        return _Found(self.objects[places], None if self.maps is None else self.maps[places])


def add_detect(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "detect",
        run_detect,
        "find things in pictures, with boxes",
        "Finds things of one or several kinds in each picture, and says where they are.",
        _detect_EPILOG,
    )
    add_objects(parser, "the boxes", f"{FIELDS}, heat_map")
    parser.add_argument(
        OPTION,
        metavar="PATH",
        help="draw where the model looked for each box, in the order of the lines: a picture "
        "file, or for several pictures a directory",
    )
    options.add_model(parser)


def run_detect(args: argparse.Namespace) -> int:
    """`paligemma detect`; returns the exit code."""
    from paligemma_jax.processing import prompts

    check_arguments(args, "labels")
    labels = labels_of(args)
    prompt = prompts.detect(labels)
    targets = plan_drawings(args)
    heat_targets = plan(args, targets)

    def ask(pipeline: "Pipeline", pictures: list[Picture]) -> list[_Found]:
        images = [picture.image for picture in pictures]
        found = [_Found(one) for one in pipeline.detect_batch(images, labels, **limits(args))]
        if heat_targets:
            texts = [one.text for one in found]
            maps = looked_at(pipeline, images, prompt, texts)
            found = [_Found(one.objects, seen) for one, seen in zip(found, maps, strict=True)]
        return [one.take(places_to_show(one.objects, args)) for one in found]

    def present(reply: Answered[_Found]) -> Shown:
        found, image = reply.answer.objects, reply.picture.image
        fields = draw_objects(found, image, targets.get(reply.name), args)
        if reply.answer.maps is not None:
            target = heat_targets[reply.name]
            save(image, found, reply.answer.maps, target, force=args.force)
            fields["heat_map"] = str(target)
        return str(found), fields

    return report_each(args, prompt, ask, present)


_segment_EPILOG = """\
Examples:
  paligemma segment photo.jpg cat --out masks.png
  paligemma segment photo.jpg "cat ; dog" --masks masks/       a file for each object
  paligemma segment *.jpg person --json > people.jsonl         run lengths and outlines
  paligemma segment photo.jpg cat --model pt-224.npz --mask-codec vae-oid.npz

A line is: label (score): x1 y1 x2 y2, as paligemma detect prints it. JSON has the mask of each
object as COCO's run lengths (rle) and as polygons, in pixels of the picture. Files of --masks have
255 where the object is and 0 elsewhere, and are as large as the picture.
"""
_FIELDS = "answer, width, height, objects (label, box, score, rle, polygons, mask), unparsed, out"


def add_segment(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "segment",
        run_segment,
        "find things in pictures, with masks",
        "Finds things of one or several kinds in each picture, and which pixels are theirs.",
        _segment_EPILOG,
    )
    add_objects(parser, "the masks and boxes", _FIELDS)
    parser.add_argument(
        mask_files.OPTION,
        metavar="DIR",
        help="write each mask to a file of its own, such as DIR/photo-1-cat.png",
    )
    options.add_model(parser, masks=True)


def run_segment(args: argparse.Namespace) -> int:
    """`paligemma segment`; returns the exit code."""
    from paligemma_jax.processing import prompts

    check_arguments(args, "labels")
    labels = labels_of(args)
    prompt = prompts.segment(labels)
    targets = plan_drawings(args)
    files = None
    if args.masks is not None:
        taken = targets.values()
        files = MaskFiles(args.masks, args.pictures, force=args.force, taken=taken)

    def ask(pipeline: "Pipeline", pictures: list[Picture]) -> "list[Segmentations]":
        images = [picture.image for picture in pictures]
        found = pipeline.segment_batch(images, labels, **limits(args))
        return [one[places_to_show(one, args)] for one in found]

    def present(reply: "Answered[Segmentations]") -> Shown:
        found = reply.answer
        fields = draw_objects(found, reply.picture.image, targets.get(reply.name), args)
        if files is not None:
            paths = files.save(reply.name, found)
            for fields_of_one, path in zip(fields["objects"], paths, strict=True):
                fields_of_one["mask"] = path
        return str(found), fields

    return report_each(args, prompt, ask, present)
