"""`paligemma segment`: boxes and masks as text, as JSON, drawn, and as files."""

import argparse
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import mask_files, options
from paligemma_jax.cli.asking import Answered
from paligemma_jax.cli.mask_files import MaskFiles
from paligemma_jax.cli.objects import (
    add_objects,
    draw_objects,
    labels_of,
    limits,
    places_to_show,
    plan_drawings,
)
from paligemma_jax.cli.pictures import Picture, check_arguments
from paligemma_jax.cli.report import Shown, report_each

if TYPE_CHECKING:
    from paligemma_jax.pipeline import Pipeline
    from paligemma_jax.processing.segmentations import Segmentations

_EPILOG = """\
Examples:
  paligemma segment photo.jpg cat --out masks.png
  paligemma segment photo.jpg "cat ; dog" --masks masks/       a file for each object
  paligemma segment *.jpg person --json > people.jsonl         run lengths and outlines
  paligemma segment photo.jpg cat --model pt-224.npz --mask-codec vae-oid.npz

A line is: label (score): x1 y1 x2 y2, as paligemma detect prints it. JSON has the mask of each
object as COCO's run lengths (rle) and as polygons, in pixels of the picture. Files of --masks have
255 where the object is and 0 elsewhere, and are as large as the picture.
"""
_FIELDS = "answer, width, height, objects (label, box, score, rle, polygons, mask), unused, out"


def add(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "segment",
        run,
        "find things in pictures, with masks",
        "Finds things of one or several kinds in each picture, and which pixels are theirs.",
        _EPILOG,
    )
    add_objects(parser, "the masks and boxes", _FIELDS)
    parser.add_argument(
        mask_files.OPTION,
        metavar="DIR",
        help="write each mask to a file of its own, such as DIR/photo-1-cat.png",
    )
    options.add_model(parser, masks=True)


def run(args: argparse.Namespace) -> int:
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
