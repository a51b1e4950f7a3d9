"""Options that several commands share, and how their help looks."""

import argparse
import math
import textwrap
from collections.abc import Callable
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
MAX_NEW_TOKENS, CONTEXT = 128, 8192  # Gemma's context


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves examples as they are written."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    """A command's parser; `commands` is what `add_subparsers` gave, `run` returns an exit code."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 88),
        epilog=epilog,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run, usage_error=parser.error)
    group = parser.add_argument_group("messages")
    group.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show progress on standard error (default: on a terminal)",
    )
    group.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """The pictures that a command asks about."""
    parser.add_argument(
        "pictures",
        nargs="+",
        metavar="PICTURE",
        help="file of a picture, or - for standard input; several are answered one by one",
    )


def add_answering(parser: argparse.ArgumentParser) -> None:
    """How pictures are answered and the answers printed."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON document a line and picture: file, prompt, answer, tokens, logprob",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive(CONTEXT),
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="where an answer without end is cut (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive(1024),
        default=8,
        metavar="N",
        help="pictures that go through the model together (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-urls", action="store_true", help="a PICTURE may be an http(s) address"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model answers."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="demo",
        metavar="MODEL",
        help="demo (the default), a Hugging Face directory, a big_vision .npz, or a directory "
        "written by paligemma convert",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of weights and activations (default: float32 for demo, else bfloat16)",
    )
    group.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.model, where none lies beside the weights"
    )
    group.add_argument(
        "--resolution",
        type=positive(1 << 14),
        metavar="N",
        help="pixels a side that pictures are resized to (default: as the model was trained)",
    )


def positive(limit: int) -> Callable[[str], int]:
    """Type of an option that is a whole number from 1 to `limit`."""
    return _whole_number(1, limit)


def seed(text: str) -> int:
    """Type of an option that starts a random number generator."""
    return _whole_number(0, 2**32 - 1)(text)


def temperature(text: str) -> float:
    """Type of an option that is a finite number, not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no temperature; 0, 0.7 or 1 would fit")
    return value


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.isdecimal() and len(text) < 12 else -1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high:,}")
        return value

    return parse
