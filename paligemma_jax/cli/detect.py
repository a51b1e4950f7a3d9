"""`paligemma detect`: boxes as text, as JSON, and drawn on the pictures."""

import argparse
from pathlib import Path
from typing import Any

from paligemma_jax.cli import options
from paligemma_jax.cli.asking import Answered
from paligemma_jax.cli.picture_files import plan_targets, save_picture
from paligemma_jax.cli.pictures import check_arguments
from paligemma_jax.cli.report import report_each

_EPILOG = """\
Examples:
  paligemma detect photo.jpg cat
  paligemma detect photo.jpg "cat ; dog" --out boxes.png
  paligemma detect *.jpg person --out boxes/ --json > boxes.jsonl

A line is: label: x1 y1 x2 y2, in pixels of the picture, from its top left corner. "nothing found"
is an answer too (exit code 0).
"""


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
    options.add_pictures(parser)
    parser.add_argument(
        "labels", metavar="LABELS", help='what to find, after all pictures: "cat ; dog"'
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="draw the boxes: a picture file, or for several pictures a directory",
    )
    parser.add_argument("--force", action="store_true", help="replace files at --out")
    options.add_answering(parser)
    options.add_model(parser)


def run(args: argparse.Namespace) -> int:
    """`paligemma detect`; returns the exit code."""
    from paligemma_jax.processing import prompts
    from paligemma_jax.processing.detections import Detections
    from paligemma_jax.viz import draw_boxes

    check_arguments(args, "labels")
    labels = [label.strip() for label in args.labels.split(";") if label.strip()]
    prompt = prompts.detect(labels)
    targets: dict[str, Path] = {}
    if args.out is not None:
        targets = plan_targets(args.out, args.pictures, force=args.force)

    def present(reply: Answered) -> tuple[str, dict[str, Any]]:
        found = Detections.from_text(reply.answer.text, *reply.image.size)
        fields = found.to_dict()
        del fields["text"]
        if reply.name in targets:
            save_picture(draw_boxes(reply.image, found), targets[reply.name], force=args.force)
            fields["out"] = str(targets[reply.name])
        return str(found), fields

    return report_each(args, prompt, present)
