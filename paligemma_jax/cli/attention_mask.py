"""attention-mask: which tokens of a prompt attend to which, as text, as an image, or as JSON."""

import argparse
import dataclasses
import shutil
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.files import (
    IMAGE_FORMATS,
    SVG,
    check_target,
    save_image,
    user_path,
    write_whole,
)
from paligemma_jax.cli.output import encodes_unicode, print_json
from paligemma_jax.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import numpy as np

    from paligemma_jax.config import PaliGemmaConfig
    from paligemma_jax.processing.processor import Processor
    from paligemma_jax.viz.attention_mask import AttentionMaskView

MAX_TOKENS = 16_384  # a mask takes the square of that in bytes
_EPILOG = """\
Examples:
  paligemma attention-mask --prompt "detect cat"
  paligemma attention-mask --prompt "answer en is it a dog?" --answer yes --out mask.svg
  paligemma attention-mask --prompt "caption en" --answer "a dog" --images 2 --length 16
  paligemma attention-mask --prompt "caption en" --answer "a dog" --sliding-window 4

Images and prompt attend to each other; an answer attends to them and to what it has so far. Without
--answer this is the mask that generation begins with, with it the one of training. No weights are
read.
"""
_ASCII = str.maketrans({"█": "#", "▒": "+", "·": ".", "─": "-", "│": "|", "┼": "+",
                        "×": "x", "…": "~", "\u2581": "_"})  # fmt: skip


def add_attention_mask(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands, "attention-mask", run_attention_mask, "show the attention mask of a prompt",
        "Shows the attention mask of a prompt in the terminal, or draws it.", _EPILOG,
        json="one JSON object: tokens (kind, label, image), and for each mask its layers and, for "
        "each token, the ranges [start, stop) that it attends to",
    )  # fmt: skip
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="as the model gets it")
    parser.add_argument("--answer", metavar="TEXT", help="an answer to it")
    parser.add_argument(
        "--images", type=options.at_least(0), default=1, metavar="N",
        help="images, or frames, of the prompt (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--length", type=options.at_least(1), metavar="N",
        help="text tokens to pad to (default: no padding)",
    )  # fmt: skip
    parser.add_argument(
        "--sliding-window", type=options.at_least(1), metavar="N",
        help="tokens that answers attend to on even layers (default: as in the checkpoint)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="draw it: a .svg, or a .png")
    parser.add_argument("--force", action="store_true", help="replace the file at --out")
    options.add_model(parser, weights=False)


def run_attention_mask(args: argparse.Namespace) -> int:
    """`paligemma attention-mask`; returns the exit code."""
    out = None if args.out is None else user_path(args.out)
    if out is not None:
        check_target(out, option="--out", force=args.force, suffixes=(SVG, *IMAGE_FORMATS))
    from paligemma_jax.viz.attention_mask import attention_mask

    config, processor = _read_model(args)
    _check_size(args, config, processor)
    view = attention_mask(
        config, processor, args.prompt, args.answer, images=args.images, length=args.length
    )
    if out is not None and out.suffix.lower() == SVG:
        svg = view.to_svg().encode()
        write_whole(out, lambda file: file.write(svg), "--out")
    elif out is not None:
        save_image(view.to_image(), out, option="--out", force=args.force)
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
                f"expected a tokenizer.model beside {checkpoint.path}. Copy it there, or pass: "
                "--tokenizer tokenizer.model"
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
    if size > MAX_TOKENS:
        raise ConfigError(
            f"expected at most {MAX_TOKENS:,} tokens to draw, got {size:,}. Pass fewer --images, "
            "or a shorter --prompt, --answer or --length"
        )


def _fields(view: "AttentionMaskView") -> dict[str, Any]:
    tokens = [
        {"kind": token.kind, "label": token.label} | ({"image": token.image} if token.image else {})
        for token in view.tokens
    ]
    masks = [
        {"layers": layers, "attends_to": [_ranges(row) for row in mask]}
        for layers, mask in zip(view.layers, view.masks, strict=True)
    ]
    return {"tokens": tokens, "masks": masks}


def _ranges(row: "np.ndarray") -> list[list[int]]:
    """[start, stop) of the runs of True in bool[S]."""
    import numpy as np

    edges = np.flatnonzero(np.diff(row, prepend=False, append=False))
    return edges.reshape(-1, 2).tolist()
