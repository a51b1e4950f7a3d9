"""Commands whose answer is words: caption, answer, ocr, count and generate."""

import argparse
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.answers import Answers, ask_in_words, plain_fields, show_in_words
from paligemma_jax.cli.asking import Answered, pictures_of
from paligemma_jax.cli.choosing import add_choosing, check_choosing
from paligemma_jax.cli.live import stream_each, stream_together
from paligemma_jax.cli.pictures import Picture, check_arguments
from paligemma_jax.cli.report import Shown, report_each, report_together
from paligemma_jax.errors import UnexpectedAnswerError

if TYPE_CHECKING:
    from paligemma_jax.answering.generation import Generation
    from paligemma_jax.pipeline import Pipeline

_LANGUAGES = """\
Published models know 34 languages, among them en, es, de, fr, zh; the demo model en, es, de, fr.
"""
_CAPTION = f"""\
Examples:
  paligemma caption photo.jpg
  paligemma caption photo.jpg --language de
  paligemma caption *.jpg --json > captions.jsonl
  paligemma caption photo.jpg --best-of 8 --top-p 0.9

{_LANGUAGES}"""
_ANSWER = f"""\
Examples:
  paligemma answer photo.jpg "what colour is the car?"
  paligemma answer photo.jpg "was ist das?" --language de
  paligemma answer one.jpg two.jpg "is there a dog?"                  an answer for each picture
  paligemma answer one.jpg two.jpg "are these the same?" --together   one answer about both
  paligemma answer clip.mp4 "what is the dog doing?" --frames 8       one answer about 8 frames

A video (.mp4, .webm, .mov, .mkv, .avi) is several pictures of one prompt. Reading it takes the
extra "video": pip install "paligemma-jax[video]"

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
  paligemma generate photo.jpg "describe en" --stream --max-new-tokens 256
  paligemma generate photo.jpg "describe en" --temperature 0.7 --top-p 0.9 --seed 1
  paligemma generate photo.jpg "caption en" --begin "a photo of" --stop .
  paligemma generate photo.jpg "caption en" --beams 4 --alpha 0.6 --json
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

Of --temperature, --top-k, --top-p and --min-p each sees what those before it left. Prompts without
a picture: paligemma text
"""


def add(commands: Any) -> None:
    """Adds the parsers of these commands."""
    caption = options.add_command(
        commands, "caption", run_caption, "describe pictures",
        "Describes each picture in a sentence.", _CAPTION,
    )  # fmt: skip
    options.add_pictures(caption)
    options.add_language(caption)
    options.add_frames(caption)

    answer = options.add_command(
        commands, "answer", run_answer, "answer a question about pictures",
        "Answers a question about each picture, or about all of them together.", _ANSWER,
    )  # fmt: skip
    options.add_pictures(answer)
    answer.add_argument("question", metavar="QUESTION", help="in quotes, after all pictures")
    options.add_language(answer)
    options.add_together(answer)
    options.add_frames(answer)

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
        "Answers a prompt in PaliGemma's prompt language about pictures.", _GENERATE,
    )  # fmt: skip
    options.add_pictures(generate)
    generate.add_argument("prompt", metavar="PROMPT", help="in quotes, after all pictures")
    options.add_together(generate)
    options.add_frames(generate)

    for parser in (caption, answer, ocr, generate):
        add_choosing(parser)
    for parser in (caption, answer, ocr, count, generate):
        options.add_answering(parser)
        options.add_model(parser)


def run_caption(args: argparse.Namespace) -> int:
    """`paligemma caption`; returns the exit code."""
    from paligemma_jax.processing import prompts

    check_arguments(args)
    return _report(args, prompts.caption(args.language))


def run_answer(args: argparse.Namespace) -> int:
    """`paligemma answer`; returns the exit code."""
    from paligemma_jax.processing import prompts

    check_arguments(args, "question")
    return _report(args, prompts.answer(args.question, args.language))


def run_ocr(args: argparse.Namespace) -> int:
    """`paligemma ocr`; returns the exit code."""
    from paligemma_jax.processing import prompts

    check_arguments(args)
    return _report(args, prompts.ocr())


def run_count(args: argparse.Namespace) -> int:
    """`paligemma count`; returns the exit code."""
    from paligemma_jax.processing import prompts

    def ask(pipeline: "Pipeline", pictures: list[Picture]) -> "list[Generation]":
        return pipeline.generate(
            [pictures_of(pipeline, picture) for picture in pictures],
            [prompt] * len(pictures),
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
        )

    check_arguments(args, "things")
    prompt = prompts.count(args.things)
    return report_each(args, prompt, ask, _its_number)


def run_generate(args: argparse.Namespace) -> int:
    """`paligemma generate`; returns the exit code."""
    check_arguments(args, "prompt")
    return _report(args, args.prompt)


def _report(args: argparse.Namespace, prompt: str) -> int:
    check_choosing(args)
    together = getattr(args, "together", False)
    if args.stream:
        return stream_together(args, prompt) if together else stream_each(args, prompt)

    def ask(pipeline: "Pipeline", pictures: list[Picture]) -> list[Answers]:
        entries = [pictures_of(pipeline, picture) for picture in pictures]
        numbers = [picture.number for picture in pictures]
        return ask_in_words(args, pipeline, entries, [prompt] * len(pictures), numbers)

    def present(reply: Answered[Answers]) -> Shown:
        return show_in_words(args, reply.answer)

    report = report_together if together else report_each
    return report(args, prompt, ask, present)


def _its_number(reply: "Answered[Generation]") -> Shown:
    from paligemma_jax.processing.numbers import parse_number

    number = parse_number(reply.answer.text)
    if number is None:
        raise UnexpectedAnswerError(
            f"{reply.name}: the model answered {reply.answer.text!r}. A number would fit. Ask for "
            "its own words with: paligemma answer PICTURE QUESTION"
        )
    return str(number), plain_fields(reply.answer) | {"count": number}
