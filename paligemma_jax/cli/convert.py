"""`paligemma convert`: a checkpoint of any format into any other."""

import argparse
from pathlib import Path
from typing import Any

from paligemma_jax.cli import options
from paligemma_jax.cli.progress import byte_bar
from paligemma_jax.cli.sizes import data_size

FORMATS = ("orbax", "huggingface", "big_vision")  # as `weights.formats` has them
_EPILOG = """\
Examples:
  paligemma convert paligemma2-3b-mix-448 store/
  paligemma convert paligemma-3b-pt-224.npz store/ --tokenizer paligemma_tokenizer.model
  paligemma convert store/ for_transformers/ --to huggingface --verify
  paligemma convert store/ model.npz --to big_vision --dtype bfloat16
  paligemma convert paligemma2-3b-pt-224 pt-448/ --resolution 448
  paligemma convert paligemma2-3b-mix-448 small/ --quantize int4
  paligemma convert small/ for_transformers/ --to huggingface --dequantize

  orbax        one directory with everything in it, digests of all arrays included; loads fastest
  huggingface  sharded safetensors with tokenizer and settings: for transformers, and Roboflow's
               deploy
  big_vision   an npz; a directory of it and the tokenizer where TARGET does not end in .npz

Layers pass one by one, so that memory does not depend on the size of the model. TARGET appears when
all of it is written, and nothing that exists is overwritten. Dtypes stay as they are without
--dtype. With --quantize they are rounded as `--model SOURCE --quantize` would, once for all: only
orbax has room for that. `paligemma info TARGET --check` finds a changed byte later.
"""


def add(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "convert",
        run,
        "write a checkpoint in another format",
        "Writes a checkpoint of any format as our own store, for transformers, or as big_vision's "
        "npz.",
        _EPILOG,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="Hugging Face directory, big_vision .npz, converted directory, or demo",
    )
    parser.add_argument("target", metavar="TARGET", help="what to write; must not exist")
    parser.add_argument("--to", choices=FORMATS, default="orbax", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=options.DTYPES, help="cast all floats")
    bits = parser.add_mutually_exclusive_group()
    options.add_quantize(bits, "round weights to so many bits, and store them so")
    bits.add_argument(
        "--dequantize", action="store_true",
        help="make floats again of what is stored in few bits (default dtype: bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="resample the position embeddings to pictures of so many pixels a side",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.model or tokenizer.json, where none lies beside the weights",
    )
    options.add_mask_codec(parser)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read TARGET again, and compare it with SOURCE tensor by tensor",
    )


def run(args: argparse.Namespace) -> int:
    """`paligemma convert`; returns the exit code."""
    from paligemma_jax.resolve import find_checkpoint
    from paligemma_jax.weights.convert import convert

    source = find_checkpoint(args.source)
    with byte_bar(args, "converting") as progress:
        convert(
            source,
            args.target,
            format=args.to,
            dtype=args.dtype,
            resolution=args.resolution,
            tokenizer=args.tokenizer,
            mask_codec=args.mask_codec,
            quantize=args.quantize,
            dequantize=args.dequantize,
            verify=args.verify,
            progress=progress,
        )
    print(f"{args.target}: {describe_target(args.target)}")
    if args.verify:
        print(f"{args.target}: every tensor is as in {args.source}")
    return 0


def describe_target(path: str) -> str:
    """What was written there, in a line."""
    from paligemma_jax.weights.checkpoint import describe

    target = Path(path).expanduser()
    written = describe(target)
    size = f"{written.parameters:,} parameters in {' and '.join(written.dtypes)}"
    rest = ""
    if target.is_dir():
        rest = ", tokenizer and mask codec" if written.has_mask_codec else " and tokenizer"
        rest = f", with configuration, preprocessing{rest}"
    return f"{size}, {data_size(written.nbytes)}{rest}"
