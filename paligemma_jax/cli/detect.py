"""`paligemma detect`: boxes as text, as JSON, and drawn on the pictures."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import heat_maps, options
from paligemma_jax.cli.asking import Answered
from paligemma_jax.cli.objects import (
    FIELDS,
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
    import numpy as np

    from paligemma_jax.pipeline import Pipeline
    from paligemma_jax.processing.detections import Detections

_EPILOG = """\
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


def add(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "detect",
        run,
        "find things in pictures, with boxes",
        "Finds things of one or several kinds in each picture, and says where they are.",
        _EPILOG,
    )
    add_objects(parser, "the boxes", f"{FIELDS}, heat_map")
    parser.add_argument(
        heat_maps.OPTION,
        metavar="PATH",
        help="draw where the model looked for each box, in the order of the lines: a picture "
        "file, or for several pictures a directory",
    )
    options.add_model(parser)


def run(args: argparse.Namespace) -> int:
    """`paligemma detect`; returns the exit code."""
    from paligemma_jax.processing import prompts

    check_arguments(args, "labels")
    labels = labels_of(args)
    prompt = prompts.detect(labels)
    targets = plan_drawings(args)
    heat_targets = heat_maps.plan(args, targets)

    def ask(pipeline: "Pipeline", pictures: list[Picture]) -> list[_Found]:
        images = [picture.image for picture in pictures]
        found = [_Found(one) for one in pipeline.detect_batch(images, labels, **limits(args))]
        if heat_targets:
            texts = [one.text for one in found]
            maps = heat_maps.looked_at(pipeline, images, prompt, texts)
            found = [_Found(one.objects, seen) for one, seen in zip(found, maps, strict=True)]
        return [one.take(places_to_show(one.objects, args)) for one in found]

    def present(reply: Answered[_Found]) -> Shown:
        found, image = reply.answer.objects, reply.picture.image
        fields = draw_objects(found, image, targets.get(reply.name), args)
        if reply.answer.maps is not None:
            target = heat_targets[reply.name]
            heat_maps.save(image, found, reply.answer.maps, target, force=args.force)
            fields["heat_map"] = str(target)
        return str(found), fields

    return report_each(args, prompt, ask, present)
