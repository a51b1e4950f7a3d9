"""What `detect` and `segment` share: labels, options, and objects as lines, JSON and pictures."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.picture_files import OUT, plan_targets, save_picture

if TYPE_CHECKING:
    from PIL import Image

    from paligemma_jax.processing.detections import Detections

FIELDS = "answer, width, height, objects (label, box, score), unused, out"


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
    from paligemma_jax.processing.overlaps import distinct

    scores = found.scores or (0.0,) * len(found)
    places = [i for i, score in enumerate(scores) if score >= args.min_score]
    if args.max_overlap is not None:
        boxes = [found.boxes[i] for i in places]
        kept = distinct(boxes, [scores[i] for i in places], args.max_overlap)
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
