"""The `paligemma` command: its parser, its errors and its exit codes.

What takes long to import is imported when a command runs, so that help comes at once.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence

from paligemma_jax import __version__
from paligemma_jax.cli import (
    attention_mask,
    bench,
    box_commands,
    convert,
    demo,
    evaluate,
    models,
    text_commands,
    train,
)
from paligemma_jax.cli.options import HelpFormatter
from paligemma_jax.errors import PaliGemmaError

OK, ERROR, INTERRUPTED, BROKEN_PIPE = 0, 1, 130, 141  # and argparse's 2 for wrong usage

_EPILOG = """\
Examples:
  paligemma demo                                  what the bundled model can do, in one image
  paligemma caption photo.jpg                     a short description
  paligemma answer photo.jpg "what color is the car?"
  paligemma detect photo.jpg "cat ; dog" --out boxes.png
  paligemma segment photo.jpg cat --out masks.png --json
  paligemma classify photo.jpg "cat ; dog ; bird"
  cat photo.jpg | paligemma ocr -                 an image from standard input
  paligemma caption *.jpg --json                  JSON Lines, one object per image

Models (--model):
  "demo", the default, comes with this package. It knows only colored shapes, words and numbers on
  plain images. For photos take a published PaliGemma or PaliGemma 2: accept its license at Hugging
  Face (or Kaggle), log in (hf auth login), and name it; it is downloaded once:
    paligemma caption photo.jpg --model paligemma2-3b-mix-448
  "mix" models answer at once; "pt" models are for fine-tuning. All names: paligemma models
  A Hugging Face directory, a big_vision .npz, and an https URL are taken too.

Exit codes: 0 done; 1 an error, with one message; 2 wrong usage; 130 interrupted.
Files are written whole or not at all, and never replaced without --force.
Every command has help of its own: paligemma detect --help
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="paligemma",
        description=textwrap.fill(
            "PaliGemma and PaliGemma 2 for images and videos: captions, answers, text, counts, "
            "boxes, masks, and the probability of given answers.",
            88,
        ),
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"paligemma {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for add in (
        text_commands.add_text_commands,
        text_commands.add_text,
        box_commands.add_detect,
        box_commands.add_segment,
        text_commands.add_scoring,
        attention_mask.add_attention_mask,
        convert.add_convert,
        convert.add_quantize,
        train.add_train,
        models.add_info,
        models.add_models,
        evaluate.add_evaluate,
        bench.add_bench,
        demo.add_demo,
    ):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `argv` is that of the process if not given."""
    if argv is None:
        argv = sys.argv[1:]
        for stream in (sys.stdout, sys.stderr):
            # Answers may hold characters that the terminal's encoding lacks.
            getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    parser, debug = build_parser(), "--debug" in argv
    try:
        try:
            args = parser.parse_args(train.take_settings(argv))
            if args.command is None:
                parser.print_help()
                return OK
            return args.run(args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader is gone; without this the interpreter complains when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (KeyboardInterrupt, Exception) as e:
        known = isinstance(e, KeyboardInterrupt | PaliGemmaError | MemoryError)
        if debug or not (known or "RESOURCE_EXHAUSTED" in str(e)):
            raise  # a bug here: the traceback is what helps
        if isinstance(e, KeyboardInterrupt):
            print("paligemma: interrupted", file=sys.stderr)
            return INTERRUPTED
        if not isinstance(e, PaliGemmaError):
            e = "out of memory. Try: --dtype bfloat16 --batch-size 1, or a smaller model"
        print(f"paligemma: error: {e}", file=sys.stderr)
        return ERROR
