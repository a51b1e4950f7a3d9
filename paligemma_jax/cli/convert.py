"""`paligemma convert`: a published checkpoint into a self-contained directory."""

import argparse
from pathlib import Path
from typing import Any

from paligemma_jax.cli import options
from paligemma_jax.cli.progress import byte_bar
from paligemma_jax.cli.sizes import data_size

_EPILOG = """\
Examples:
  paligemma convert paligemma2-3b-mix-448 store/
  paligemma convert paligemma-3b-pt-224.npz store/ --tokenizer paligemma_tokenizer.model
  paligemma convert paligemma2-3b-mix-448 store/ --mask-codec vae-oid.npz
  paligemma caption photo.jpg --model store/

The directory holds weights, configuration, preprocessing, tokenizer and, where there is one, the
mask codec that paligemma segment needs. It loads faster than the published formats. Digests of all
files and arrays are in its MANIFEST.json, written last: a directory that was not finished cannot be
taken for a whole one. Dtypes stay as they are. Nothing that exists is overwritten.
"""


def add(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "convert",
        run,
        "make a checkpoint self-contained",
        "Writes a checkpoint of any format as one directory with everything in it.",
        _EPILOG,
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="Hugging Face directory, big_vision .npz, or demo"
    )
    parser.add_argument("target", metavar="TARGET", help="directory to write; must not exist")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.model or tokenizer.json, where none lies beside the weights",
    )
    options.add_mask_codec(parser)


def run(args: argparse.Namespace) -> int:
    """`paligemma convert`; returns the exit code."""
    from paligemma_jax.resolve import find_checkpoint
    from paligemma_jax.weights.checkpoint import describe
    from paligemma_jax.weights.convert import convert

    source = find_checkpoint(args.source)
    with byte_bar(args, "converting") as progress:
        convert(
            source,
            args.target,
            tokenizer=args.tokenizer,
            mask_codec=args.mask_codec,
            progress=progress,
        )
    written = describe(Path(args.target).expanduser())
    rest = ", tokenizer and mask codec" if written.has_mask_codec else " and tokenizer"
    print(
        f"{args.target}: {written.parameters:,} parameters in {' and '.join(written.dtypes)}, "
        f"{data_size(written.nbytes)}, with configuration, preprocessing{rest}"
    )
    return 0
