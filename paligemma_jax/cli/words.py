"""Commands whose answer is words: caption, answer, ocr, count and generate."""

import argparse
from typing import Any

from paligemma_jax.cli import options
from paligemma_jax.cli.asking import Answered, ask_together
from paligemma_jax.cli.pictures import check_arguments
from paligemma_jax.cli.report import Report, report_each
from paligemma_jax.errors import UnexpectedAnswerError

_LANGUAGES = """\
Published models know 34 languages, among them en, es, de, fr, zh; the demo model en, es, de, fr.
"""
_CAPTION = f"""\
Examples:
  paligemma caption photo.jpg
  paligemma caption photo.jpg --language de
  paligemma caption *.jpg --json > captions.jsonl

{_LANGUAGES}"""
_ANSWER = f"""\
Examples:
  paligemma answer photo.jpg "what colour is the car?"
  paligemma answer photo.jpg "was ist das?" --language de
  paligemma answer one.jpg two.jpg "is there a dog?"                  an answer for each picture
  paligemma answer one.jpg two.jpg "are these the same?" --together   one answer about both

{_LANGUAGES}"""
_OCR = """\
Examples:
  paligemma ocr receipt.png
  curl -s https://example.org/sign.jpg | paligemma ocr -
"""
_COUNT = """\
Examples:
  paligemma count photo.jpg cats
  paligemma count *.jpg "red cars" --json

The thing is asked for as it is written, so write the plural. An answer that is no number is an
error (exit code 1); paligemma answer shows the model's own words.
"""
_GENERATE = """\
Examples:
  paligemma generate photo.jpg "caption en"
  paligemma generate photo.jpg "describe en" --max-new-tokens 64 --temperature 0.7 --seed 1
  paligemma generate one.jpg two.jpg "answer en are these the same?" --together

The prompt goes to the model as it is. PaliGemma's prompt language:
  caption LANG                 a short caption                          (all models)
  answer LANG QUESTION         a short answer
  ocr                          the text in the picture
  detect THING ; THING         boxes, as <loc0000> to <loc1023>: top, left, bottom, right
  segment THING ; THING        boxes and mask tokens
  cap LANG                     a very short, raw caption                (pt models)
  describe LANG                a longer caption
  question LANG ANSWER         a question that has this answer
  caption <loc...> (four)      a caption of a region
"""


def add(commands: Any) -> None:
    """Adds the parsers of these commands."""
    caption = options.add_command(
        commands, "caption", run_caption, "describe pictures",
        "Describes each picture in a sentence.", _CAPTION,
    )  # fmt: skip
    options.add_pictures(caption)
    _add_language(caption)

    answer = options.add_command(
        commands, "answer", run_answer, "answer a question about pictures",
        "Answers a question about each picture, or about all of them together.", _ANSWER,
    )  # fmt: skip
    options.add_pictures(answer)
    answer.add_argument("question", metavar="QUESTION", help="in quotes, after all pictures")
    _add_language(answer)
    _add_together(answer)

    ocr = options.add_command(
        commands, "ocr", run_ocr, "read the text in pictures",
        "Reads the text in each picture.", _OCR,
    )  # fmt: skip
    options.add_pictures(ocr)

    count = options.add_command(
        commands, "count", run_count, "count things in pictures",
        "Counts things of one kind in each picture.", _COUNT,
    )  # fmt: skip
    options.add_pictures(count)
    count.add_argument("things", metavar="THINGS", help="what to count, after all pictures")

    generate = options.add_command(
        commands, "generate", run_generate, "send a prompt of your own",
        "Answers a prompt in PaliGemma's prompt language, greedily or by sampling.", _GENERATE,
    )  # fmt: skip
    options.add_pictures(generate)
    generate.add_argument("prompt", metavar="PROMPT", help="in quotes, after all pictures")
    generate.add_argument(
        "--temperature", type=options.temperature, default=0.0, metavar="T",
        help="0 takes the likeliest tokens (default); above, tokens are drawn",
    )  # fmt: skip
    generate.add_argument(
        "--seed", type=options.seed, default=0, metavar="N", help="of the draws (default: 0)"
    )
    _add_together(generate)

    for parser in (caption, answer, ocr, count, generate):
        options.add_answering(parser)
        options.add_model(parser)


def run_caption(args: argparse.Namespace) -> int:
    """`paligemma caption`; returns the exit code."""
    from paligemma_jax.processing import prompts

    check_arguments(args)
    return report_each(args, prompts.caption(args.language), _its_text)


def run_answer(args: argparse.Namespace) -> int:
    """`paligemma answer`; returns the exit code."""
    from paligemma_jax.processing import prompts

    check_arguments(args, "question")
    return _report(args, prompts.answer(args.question, args.language))


def run_ocr(args: argparse.Namespace) -> int:
    """`paligemma ocr`; returns the exit code."""
    from paligemma_jax.processing import prompts

    check_arguments(args)
    return report_each(args, prompts.ocr(), _its_text)


def run_count(args: argparse.Namespace) -> int:
    """`paligemma count`; returns the exit code."""
    from paligemma_jax.processing import prompts

    check_arguments(args, "things")
    return report_each(args, prompts.count(args.things), _its_number)


def run_generate(args: argparse.Namespace) -> int:
    """`paligemma generate`; returns the exit code."""
    check_arguments(args, "prompt")
    return _report(args, args.prompt)


def _report(args: argparse.Namespace, prompt: str) -> int:
    if not args.together:
        return report_each(args, prompt, _its_text)
    answer = ask_together(args, prompt)
    Report(args, prompt).answer(args.pictures, answer, answer.text)
    return 0


def _its_text(reply: Answered) -> tuple[str, dict[str, Any]]:
    return reply.answer.text, {}


def _its_number(reply: Answered) -> tuple[str, dict[str, Any]]:
    from paligemma_jax.processing.numbers import parse_number

    number = parse_number(reply.answer.text)
    if number is None:
        raise UnexpectedAnswerError(
            f"{reply.name}: the model answered {reply.answer.text!r}. A number would fit. Ask for "
            "its own words with: paligemma answer PICTURE QUESTION"
        )
    return str(number), {"count": number}


def _add_language(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--language", default="en", metavar="CODE", help="of the answer (default: en)"
    )


def _add_together(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--together", action="store_true", help="ask once about all pictures, or video frames"
    )
