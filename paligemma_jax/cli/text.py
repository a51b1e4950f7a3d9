"""`paligemma text`: prompts without a picture."""

import argparse
import os
from typing import Any

from paligemma_jax.cli import options
from paligemma_jax.cli.answers import ask_in_words, show_in_words
from paligemma_jax.cli.asking import load_pipeline
from paligemma_jax.cli.choosing import add_choosing, check_choosing
from paligemma_jax.cli.live import print_stream
from paligemma_jax.cli.progress import status
from paligemma_jax.cli.report import Report, Subject

_TEXT = """\
Examples:
  paligemma text "answer en what is two plus two?"
  paligemma text "question one" "question two" --json
  paligemma text "ocr" --begin "the red" --best-of 4

PaliGemma was trained on prompts with pictures; what it says without one shows what it would say
whatever the picture is. Prompts with pictures: paligemma generate
"""


def add(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands, "text", run_text, "send a prompt without a picture",
        "Answers prompts without a picture, in PaliGemma's prompt language.", _TEXT,
    )  # fmt: skip
    parser.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help="in quotes; several are answered one by one"
    )
    add_choosing(parser)
    options.add_json(parser, "one JSON document a line and prompt: prompt, answer, tokens, logprob")
    options.add_max_new_tokens(parser)
    options.add_batch_size(parser, "prompts")
    options.add_model(parser)


def run_text(args: argparse.Namespace) -> int:
    """`paligemma text`; returns the exit code."""
    check_choosing(args)
    for prompt in filter(os.path.isfile, args.prompts):
        args.usage_error(f"{prompt} is a file; with pictures: paligemma generate {prompt} PROMPT")
    pipeline = load_pipeline(args)
    labels = args.prompts if len(args.prompts) > 1 else [None]
    if args.stream:
        for number, (prompt, label) in enumerate(zip(args.prompts, labels, strict=True)):
            print_stream(args, pipeline, None, prompt, number, label)
        return 0
    report = Report(args)
    with status(args, "compiling and answering"):
        numbers = range(len(args.prompts))
        every = ask_in_words(args, pipeline, None, args.prompts, numbers)
    for prompt, label, answers in zip(args.prompts, labels, every, strict=True):
        report.answer(Subject(label, {"prompt": prompt}), show_in_words(args, answers))
    return 0
