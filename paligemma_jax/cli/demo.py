"""`paligemma demo`: the embedded model at work on one picture, beside the truth.

`paligemma mask`: which token of a prompt may see which, as text, as a picture, or as JSON.
"""

import argparse
import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.files import (
    FORMATS,
    SVG,
    check_target,
    free_name,
    save_picture,
    save_svg,
    user_path,
)
from paligemma_jax.cli.output import (
    Row,
    encodes_unicode,
    load_pipeline,
    print_json,
    render_table,
    status,
)
from paligemma_jax.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from paligemma_jax.config import PaliGemmaConfig
    from paligemma_jax.demo.showcase import Showcase
    from paligemma_jax.processing.detections import Detections, Segmentations
    from paligemma_jax.processing.location_tokens import Box
    from paligemma_jax.processing.processor import Processor
    from paligemma_jax.viz.attention_mask import AttentionMaskView


SEED = 7
LEAST_OVERLAP = 0.5  # IoU of a box or a mask that counts as right
PROMPTS = (
    *[f"caption {language}" for language in ("en", "es", "de", "fr")],
    "answer en how many shapes are there?",
    "ocr",
)  # about an image of the user's
PICTURE_SIZE = 672  # pixels; six times the model's, for people to look at
_demo_EPILOG = """\
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


def add_demo(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "demo",
        run_demo,
        "see the embedded model at work",
        "Draws a scene, asks the embedded model about it, shows its answers beside the truth, and "
        "writes the picture with the masks and boxes it found.",
        _demo_EPILOG,
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


def run_demo(args: argparse.Namespace) -> int:
    """`paligemma demo`; returns the exit code."""
    from PIL import Image

    from paligemma_jax.demo.render import render
    from paligemma_jax.demo.showcase import showcase
    from paligemma_jax.processing.image import load_image

    out = free_name(Path("paligemma-demo.png")) if args.out is None else Path(args.out).expanduser()
    check_target(out, force=args.force)
    if args.picture is None:
        shown = showcase(args.seed)
        image = Image.fromarray(render(shown.scene, PICTURE_SIZE))
        prompts = [example.prompt for example in shown.examples]
    else:
        shown, image = None, load_image(args.picture)
        prompts = list(PROMPTS)
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
    from paligemma_jax.evaluation.detection_metrics import paired_overlaps
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


def boxes_agree(found: "Sequence[Box]", right: "Sequence[Box]") -> bool:
    """Whether the two pair off: same label, and an overlap of at least LEAST_OVERLAP (IoU)."""
    from paligemma_jax.processing.detections import intersection_over_union

    left = list(found)
    for box in right:
        same = [other for other in left if other.label == box.label]
        overlaps = intersection_over_union([box], same)[0]
        if not same or overlaps.max() < LEAST_OVERLAP:
            return False
        left.remove(same[int(overlaps.argmax())])
    return not left


LONGEST = 16_384  # tokens; masks take the square of that in bytes
_mask_EPILOG = """\
Examples:
  paligemma mask --prompt "detect cat"
  paligemma mask --prompt "answer en is it a dog?" --answer yes --out mask.svg
  paligemma mask --prompt "caption en" --answer "a dog" --images 2 --length 16
  paligemma mask --prompt "caption en" --answer "a dog" --sliding-window 4

Pictures and prompt see each other; an answer sees them and what it has said itself. Without
--answer it is what answering begins with, with it the layout of training. No weights are read.
"""
_ASCII = str.maketrans({"█": "#", "▒": "+", "·": ".", "─": "-", "│": "|", "┼": "+",
                        "×": "x", "…": "~", "\u2581": "_"})  # fmt: skip


def add_mask(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "mask",
        run_mask,
        "show which token of a prompt sees which",
        "Shows the attention mask of a prompt in the terminal, or draws it.",
        _mask_EPILOG,
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="as the model gets it")
    parser.add_argument("--answer", metavar="TEXT", help="an answer to it")
    parser.add_argument(
        "--images",
        type=options.count(1024),
        default=1,
        metavar="N",
        help="pictures, or frames, of the prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--length",
        type=options.positive(LONGEST),
        metavar="N",
        help="tokens of text to pad to (default: no padding)",
    )
    parser.add_argument(
        "--sliding-window",
        type=options.positive(1 << 20),
        metavar="N",
        help="tokens that answers see on even layers (default: as the checkpoint has it)",
    )
    parser.add_argument("--out", metavar="FILE", help="draw it: a .svg, or a .png")
    parser.add_argument("--force", action="store_true", help="replace the file at --out")
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON document: tokens (kind, label, picture), and for each mask its layers and, "
        "for each token, the ranges [start, stop) that it sees",
    )
    options.add_model(parser, weights=False)


def run_mask(args: argparse.Namespace) -> int:
    """`paligemma mask`; returns the exit code."""
    out = None if args.out is None else user_path(args.out)
    if out is not None:
        check_target(out, force=args.force, endings=(SVG, *FORMATS))
    from paligemma_jax.viz.attention_mask import attention_mask

    config, processor = _read_model(args)
    _check_size(args, config, processor)
    view = attention_mask(
        config, processor, args.prompt, args.answer, images=args.images, length=args.length
    )
    if out is not None and out.suffix.lower() == SVG:
        save_svg(view.to_svg(), out, force=args.force)
    elif out is not None:
        save_picture(view.to_image(), out, force=args.force)
    if args.json:
        written = {} if out is None else {"out": str(out)}
        print_json({"prompt": args.prompt, "answer": args.answer, **_fields(view), **written})
    elif out is None:
        text = view.to_text(shutil.get_terminal_size((100, 24)).columns)
        print(text if encodes_unicode() else text.translate(_ASCII))
    return 0


def _read_model(args: argparse.Namespace) -> "tuple[PaliGemmaConfig, Processor]":
    """Architecture and processor of the checkpoint, as the options change them."""
    from paligemma_jax.loading import find_checkpoint
    from paligemma_jax.processing.processor import Processor
    from paligemma_jax.weights.checkpoint import open_checkpoint

    with open_checkpoint(find_checkpoint(args.model), tokenizer=args.tokenizer) as checkpoint:
        config, tokenizer = checkpoint.config, checkpoint.tokenizer
        if tokenizer is None:
            raise CheckpointError(
                f"There is no tokenizer beside {checkpoint.path}. A tokenizer.model of PaliGemma "
                "fits. Copy it there, or pass: --tokenizer tokenizer.model"
            )
        processor = Processor.from_dict(checkpoint.processor_settings, tokenizer)
    if args.resolution is not None:
        img = dataclasses.replace(config.img, image_size=args.resolution)
        config = dataclasses.replace(config, img=img)
    if args.sliding_window is not None:
        llm = dataclasses.replace(config.llm, sliding_window=args.sliding_window)
        config = dataclasses.replace(config, llm=llm)
    return config, processor


def _check_size(
    args: argparse.Namespace, config: "PaliGemmaConfig", processor: "Processor"
) -> None:
    """Raises ConfigError before memory runs out."""
    text = len(processor.prompt_ids(args.prompt))
    if args.answer is not None:
        text += len(processor.tokenizer.encode(args.answer)) + 1
    size = args.images * config.img.num_patches + max(text, args.length or 0)
    if size > LONGEST:
        raise ConfigError(
            f"The mask would have {size:,} tokens a side. At most {LONGEST:,} fit. Show fewer "
            "--images, or a shorter --prompt, --answer and --length."
        )


def _fields(view: "AttentionMaskView") -> dict[str, Any]:
    tokens = [
        {"kind": token.kind, "label": token.label}
        | ({"picture": token.picture} if token.picture else {})
        for token in view.tokens
    ]
    masks = [
        {"layers": layers, "sees": [_ranges(row) for row in mask]}
        for layers, mask in zip(view.layers, view.masks, strict=True)
    ]
    return {"tokens": tokens, "masks": masks}


def _ranges(row: "np.ndarray") -> list[list[int]]:
    """[start, stop) of the runs of True in bool[S]."""
    import numpy as np

    edges = np.flatnonzero(np.diff(row, prepend=False, append=False))
    return edges.reshape(-1, 2).tolist()
