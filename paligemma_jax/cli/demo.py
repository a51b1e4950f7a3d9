"""demo: the bundled model at work on one image, beside the truth."""

import argparse
import dataclasses
import itertools
import shlex
import shutil
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.files import check_target, free_name, save_image, user_path
from paligemma_jax.cli.output import encodes_unicode, load_pipeline, status

if TYPE_CHECKING:
    from paligemma_jax.demo.showcase import Showcase
    from paligemma_jax.processing.detections import Detections, Segmentations
    from paligemma_jax.processing.location_tokens import Box

SEED = 7
IMAGE_SIZE = 672  # pixels; six times the model's, for people to look at
MIN_IOU = 0.5  # of a box or a mask that counts as right
PROMPTS = (
    *[f"caption {language}" for language in ("en", "es", "de", "fr")],
    "answer en how many shapes are there?",
    "ocr",
)  # about an image of the user's
_EPILOG = """\
Examples:
  paligemma demo
  paligemma demo --seed 5 --out five.png
  paligemma demo --image drawing.png

The bundled model is a PaliGemma of 4 million parameters, trained on a synthetic world of colored
shapes, words and numbers. The scenes drawn here were never part of its training.
"""
_NEXT = """
Next:
  paligemma demo --seed 5                      another scene
  paligemma ocr {out}
  paligemma --help                             everything else

The demo model knows only this small world. For photos take a published model: accept its license
at https://huggingface.co/google/paligemma2-3b-mix-448, then
  pip install "paligemma-jax[hub]" && hf auth login
  paligemma caption photo.jpg --model paligemma2-3b-mix-448"""


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt and the model's answer; the truth and whether the answer is right, where known."""

    prompt: str
    answer: str
    truth: str | None = None
    right: bool | None = None


def add_demo(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands, "demo", run_demo, "see the bundled model at work",
        "Draws a scene, asks the bundled model about it, shows its answers beside the truth, and "
        "writes the image with the masks and boxes it found.", _EPILOG,
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="FILE", help="image to write (default: paligemma-demo.png)"
    )
    parser.add_argument("--force", action="store_true", help="replace the file at --out")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--seed", type=options.at_least(0), default=SEED, metavar="N", help="draws another scene"
    )
    what.add_argument("--image", metavar="FILE", help="ask about this image instead")
    options.add_model(parser)


def run_demo(args: argparse.Namespace) -> int:
    """`paligemma demo`; returns the exit code."""
    from PIL import Image

    from paligemma_jax.demo.render import render
    from paligemma_jax.demo.showcase import showcase
    from paligemma_jax.processing.image import load_image

    out = free_name(Path("paligemma-demo.png")) if args.out is None else user_path(args.out)
    check_target(out, option="--out", force=args.force)
    if args.image is None:
        scene = showcase(args.seed)
        image = Image.fromarray(render(scene.scene, IMAGE_SIZE))
        prompts, label = [example.prompt for example in scene.examples], scene.label
    else:
        scene, image, prompts, label = None, load_image(args.image), list(PROMPTS), "shape"
    pipeline = load_pipeline(args)
    if scene is not None:
        print(f"A scene that the model has never seen (seed {args.seed}).\n", flush=True)
    began = time.monotonic()
    with status(args, "compiling the model for this machine"):
        answers = pipeline.generate([image] * len(prompts), prompts, max_new_tokens=64)
        encoded = pipeline.encode(image)
        boxes = pipeline.detect(encoded, label)
        # Another model may have no mask codec; its boxes are drawn then.
        masks = None if pipeline.mask_codec is None else pipeline.segment(encoded, label)
    seconds = time.monotonic() - began
    rows = [Row(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True)]
    rows.append(Row(f"detect {label}", str(boxes)))
    if masks is not None:
        rows.append(Row(f"segment {label}", str(masks)))
    if scene is not None:
        rows = _compare(rows, boxes, masks, scene)
    for line in render_table(rows, marks="✓✗" if encodes_unicode() else "+-"):
        print(line)
    drawn = (boxes if masks is None else masks).draw(image)
    save_image(drawn, out, option="--out", force=args.force)
    if scene is not None:
        print(f"\n{sum(bool(row.right) for row in rows)} of {len(rows)} right. ", end="")
    else:
        print()
    print(f"Answered in {seconds:.1f} s, compilation included.")
    print(f"The image, with what was found: {out}")
    print(_NEXT.format(out=shlex.quote(str(out))))
    return 0


def _compare(
    rows: Sequence[Row], boxes: "Detections", masks: "Segmentations | None", scene: "Showcase"
) -> list[Row]:
    """The rows with the truth; the last ones are detect and, where there are masks, segment."""
    import numpy as np

    from paligemma_jax.demo.render import shape_mask
    from paligemma_jax.evaluation.detection_metrics import paired_overlaps
    from paligemma_jax.processing.detections import Detections

    objects = str(Detections(tuple(scene.boxes), "", boxes.width, boxes.height))
    truths = [example.answer for example in scene.examples] + [objects] * 2
    right = [row.answer == truth for row, truth in zip(rows, truths, strict=False)]
    right[len(scene.examples)] = boxes_agree(boxes.boxes, scene.boxes)
    if masks is not None:
        true_masks = np.stack([shape_mask(shape, masks.height) for shape in scene.shapes])
        right[-1] = min(paired_overlaps(masks.masks, true_masks)) >= MIN_IOU
    return [
        dataclasses.replace(row, truth=truth, right=fine)
        for row, truth, fine in zip(rows, truths, right, strict=False)
    ]


def boxes_agree(found: "Sequence[Box]", true: "Sequence[Box]") -> bool:
    """Whether the two pair off: same label, and an IoU of at least MIN_IOU."""
    from paligemma_jax.processing.detections import intersection_over_union

    left = list(found)
    for box in true:
        same = [other for other in left if other.label == box.label]
        overlaps = intersection_over_union([box], same)[0]
        if not same or overlaps.max() < MIN_IOU:
            return False
        left.remove(same[int(overlaps.argmax())])
    return not left


def render_table(rows: Sequence[Row], marks: str) -> Iterator[str]:
    """Lines of a table as wide as the terminal; `marks` are the characters for right and wrong."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 72), 128)
    known = any(row.truth is not None for row in rows)
    headings = ["prompt", "the model's answer", *(["the truth"] if known else [])]
    widths = [1, *[(width - 1) // len(headings) - 2] * len(headings)]
    yield _line(widths, ["", *headings])
    yield "-" * (sum(widths) + 2 * len(headings))
    for row in rows:
        mark = "" if row.right is None else marks[0] if row.right else marks[1]
        texts = [mark, row.prompt, row.answer or "(empty)"]
        if known:
            texts.append(row.truth or "(empty)")
        cells = [_wrap(text, size) for text, size in zip(texts, widths, strict=True)]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            yield _line(widths, parts)


def _wrap(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width)]


def _line(widths: Sequence[int], cells: Sequence[str]) -> str:
    padded = (f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
    return "  ".join(padded).rstrip()
