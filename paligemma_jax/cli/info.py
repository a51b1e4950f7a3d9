"""`paligemma info`: what a model is, before or after it is downloaded."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.progress import byte_bar
from paligemma_jax.config import VARIANTS

if TYPE_CHECKING:
    from paligemma_jax.weights.checkpoint import CheckpointInfo

_EPILOG = """\
Examples:
  paligemma info --list                      every published model
  paligemma info paligemma2-3b-mix-448       from its name; nothing is downloaded
  paligemma info store/                      what a checkpoint on disk holds, from its headers
  paligemma info store/ --check              reads all of it and compares the digests
"""


def add(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "info",
        run,
        "show what a model or checkpoint is",
        "Shows architecture, parameters and memory of a published model, or of a checkpoint on "
        "disk.",
        _EPILOG,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", nargs="?", metavar="MODEL", help="name or path; demo is one too")
    what.add_argument("--list", action="store_true", help="list the published models")
    parser.add_argument(
        "--check", action="store_true", help="verify the digests of a converted checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")


def run(args: argparse.Namespace) -> int:
    """`paligemma info`; returns the exit code."""
    if args.list:
        return _list(args)
    from paligemma_jax.cli.describe import as_dict, as_text
    from paligemma_jax.resolve import find_checkpoint, published_name

    published = published_name(args.model)
    if published is None or args.check or Path(args.model).expanduser().exists():
        checkpoint = _checkpoint(args, find_checkpoint(args.model, download=False))
        name, config = str(checkpoint.path), checkpoint.config
    else:
        checkpoint, name, config = None, published, VARIANTS[published]
    if args.json:
        print(json.dumps(as_dict(name, config, checkpoint)))
    else:
        print(as_text(name, config, checkpoint))
        if args.check:
            print("  check           every file and array is as it was written")
        if checkpoint is None:
            print(f"\nTo download it: paligemma download {name}")
    return 0


def _checkpoint(args: argparse.Namespace, path: Path) -> "CheckpointInfo":
    from paligemma_jax.weights.check import check
    from paligemma_jax.weights.checkpoint import describe

    if args.check:
        with byte_bar(args, "checking") as progress:
            check(path, progress)
    return describe(path)


def _list(args: argparse.Namespace) -> int:
    from paligemma_jax.weights.footprint import parameter_counts

    rows = [
        {
            "name": name,
            "parameters": sum(parameter_counts(config).values()),
            "resolution": config.img.image_size,
            "image_tokens": config.img.num_patches,
            "text_length": config.text_length,
        }
        for name, config in VARIANTS.items()
    ]
    if args.json:
        print(json.dumps(rows))
        return 0
    width = max(map(len, VARIANTS))
    print(f"{'name':{width}}  {'parameters':>14}  pixels  image tokens  text tokens")
    for row in rows:
        print(
            f"{row['name']:{width}}  {row['parameters']:14,}  {row['resolution']:6}  "
            f"{row['image_tokens']:12,}  {row['text_length']:11}"
        )
    return 0
