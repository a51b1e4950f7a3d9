"""`paligemma demo`: the embedded model at work on one picture, beside the truth."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.asking import load_pipeline
from paligemma_jax.cli.picture_files import check_target, free_name, save_picture
from paligemma_jax.cli.progress import status
from paligemma_jax.cli.report import encodes_unicode
from paligemma_jax.cli.table import Row, render_table

if TYPE_CHECKING:
    from PIL import Image

    from paligemma_jax.demo.showcase import Showcase
    from paligemma_jax.processing.detections import Detections
    from paligemma_jax.processing.segmentations import Segmentations

SEED = 7
LEAST_OVERLAP = 0.5  # IoU of a mask that counts as right
PICTURE_SIZE = 672  # pixels; six times the model's, for people to look at
_EPILOG = """\
Examples:
  paligemma demo
  paligemma demo --seed 5 --out five.png
  paligemma demo --picture drawing.png

The embedded model is a PaliGemma of 4 million parameters, trained on a synthetic world of coloured
shapes, words and numbers. The scenes drawn here were never part of its training.
"""
_NEXT = """
Next:
  paligemma demo --seed 5                      another scene
  paligemma answer drawing.png "how many circles are there?"
  paligemma --help                             everything else

The demo model knows only this small world. For photos take a published model: accept its licence
at https://huggingface.co/google/paligemma2-3b-mix-448, then
  pip install "paligemma-jax[hub]" && hf auth login
  paligemma caption photo.jpg --model paligemma2-3b-mix-448"""


def add(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "demo",
        run,
        "see the embedded model at work",
        "Draws a scene, asks the embedded model about it, shows its answers beside the truth, and "
        "writes the picture with the masks and boxes it found.",
        _EPILOG,
    )
    parser.add_argument(
        "--out", metavar="FILE", help="picture to write (default: paligemma-demo.png)"
    )
    parser.add_argument("--force", action="store_true", help="replace the file at --out")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--seed", type=options.seed, default=SEED, metavar="N", help="draws another scene"
    )
    what.add_argument("--picture", metavar="FILE", help="ask about this picture instead")
    options.add_model(parser)


def run(args: argparse.Namespace) -> int:
    """`paligemma demo`; returns the exit code."""
    from PIL import Image

    from paligemma_jax.demo.render import render
    from paligemma_jax.demo.showcase import questions_without_answers, showcase
    from paligemma_jax.processing.image_source import load_image

    out = free_name(Path("paligemma-demo.png")) if args.out is None else Path(args.out).expanduser()
    check_target(out, force=args.force)
    if args.picture is None:
        shown = showcase(args.seed)
        image = Image.fromarray(render(shown.scene, PICTURE_SIZE))
        prompts = [example.prompt for example in shown.examples]
    else:
        shown, image = None, load_image(args.picture)
        prompts = questions_without_answers()
    _ask_and_show(args, image, prompts, shown, out)
    print(_NEXT)
    return 0


def _ask_and_show(
    args: argparse.Namespace,
    image: "Image.Image",
    prompts: list[str],
    shown: "Showcase | None",
    out: Path,
) -> None:
    pipeline = load_pipeline(args)
    if shown is not None:
        print(f"A scene that the model has never seen (seed {args.seed}).\n", flush=True)
    began = time.monotonic()
    label = "shape" if shown is None else shown.label
    with status(args, "compiling the model for this machine"):
        answers = pipeline.generate([image] * len(prompts), prompts, max_new_tokens=64)
        encoded = pipeline.encode(image)
        boxes = pipeline.detect(encoded, label)
        # Another model may have no codec; its boxes are drawn then.
        masks = None if pipeline.mask_codec is None else pipeline.segment(encoded, label)
    seconds = time.monotonic() - began
    questions = [*prompts, f"detect {label}"]
    texts = [*[answer.text for answer in answers], str(boxes)]
    if masks is not None:
        questions, texts = [*questions, f"segment {label}"], [*texts, str(masks)]
    if shown is None:
        rows = [Row(question, text) for question, text in zip(questions, texts, strict=True)]
    else:
        rows = _compare(questions, texts, boxes, masks, shown)
    for line in render_table(rows, marks="✓✗" if encodes_unicode() else "+-"):
        print(line)
    save_picture((boxes if masks is None else masks).draw(image), out, force=args.force)
    if shown is not None:
        right = sum(bool(row.right) for row in rows)
        print(f"\n{right} of {len(rows)} right. ", end="")
    else:
        print()
    print(f"Answered in {seconds:.1f} s, compilation included.")
    print(f"The picture, with what it found: {out}")


def _compare(
    questions: list[str],
    texts: list[str],
    boxes: "Detections",
    masks: "Segmentations | None",
    shown: "Showcase",
) -> list[Row]:
    import numpy as np

    from paligemma_jax.demo.render import shape_mask
    from paligemma_jax.demo.showcase import boxes_agree
    from paligemma_jax.evaluation.metrics.mask_pairs import paired_overlaps
    from paligemma_jax.processing.detections import Detections

    places = str(Detections(shown.boxes, "", boxes.width, boxes.height))
    truths = [example.answer for example in shown.examples] + [places] * 2
    right = [text == truth for text, truth in zip(texts, truths, strict=False)]
    right[len(shown.examples)] = boxes_agree(boxes.boxes, shown.boxes)
    if masks is not None:
        true_masks = np.stack([shape_mask(shape, masks.height) for shape in shown.shapes])
        right[-1] = min(paired_overlaps(masks.masks, true_masks)) >= LEAST_OVERLAP
    return [
        Row(question, text, truth, fine)
        for question, text, truth, fine in zip(questions, texts, truths, right, strict=False)
    ]
