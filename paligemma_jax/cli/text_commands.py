"""Commands whose answer is words: caption, answer, ocr, count and generate.

`paligemma text`: prompts without a picture.

`paligemma classify` and `paligemma score`: how likely given answers are.
"""

import argparse
import os
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.files import Picture, check_arguments
from paligemma_jax.cli.options import add_choosing, check_choosing
from paligemma_jax.cli.output import (
    Answered,
    Answers,
    Ask,
    Report,
    Shown,
    Subject,
    ask_in_words,
    load_pipeline,
    pictures_of,
    plain_fields,
    print_stream,
    report_each,
    report_together,
    show_in_words,
    status,
    stream_each,
    stream_together,
)
from paligemma_jax.errors import UnexpectedAnswerError

if TYPE_CHECKING:
    from paligemma_jax.generation.results import Generation
    from paligemma_jax.generation.scoring import Classification, ScoredAnswer
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


def add_words(commands: Any) -> None:
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
    from paligemma_jax.processing.prompts import parse_number

    number = parse_number(reply.answer.text)
    if number is None:
        raise UnexpectedAnswerError(
            f"{reply.name}: the model answered {reply.answer.text!r}. A number would fit. Ask for "
            "its own words with: paligemma answer PICTURE QUESTION"
        )
    return str(number), plain_fields(reply.answer) | {"count": number}


_TEXT = """\
Examples:
  paligemma text "answer en what is two plus two?"
  paligemma text "question one" "question two" --json
  paligemma text "ocr" --begin "the red" --best-of 4

PaliGemma was trained on prompts with pictures; what it says without one shows what it would say
whatever the picture is. Prompts with pictures: paligemma generate
"""


def add_text(commands: Any) -> None:
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


QUESTION = "what is in the image?"
_CLASSIFY = """\
Examples:
  paligemma classify photo.jpg "cat ; dog ; bird"
  paligemma classify *.jpg "cat ; dog" --json > kinds.jsonl
  paligemma classify photo.jpg "red ; blue" --question "what colour is the car?"
  paligemma classify photo.jpg "chat ; chien" --language fr --question "quel est cet animal ?"

A line is: probability label, the likeliest first; of several pictures only the likeliest (--top).
Probabilities are those of the labels compared with each other, so they sum to 1. Whether the model
would say any of them by itself tells "coverage" in JSON, from 0 to 1.
"""
_SCORE = """\
Examples:
  paligemma score photo.jpg "answer en is it a dog?" --candidates yes no
  paligemma score photo.jpg "caption en" --candidates "a dog on grass" "a cat" --json
  paligemma score a.jpg b.jpg "answer en are these the same?" --together --candidates yes no

A line is: log-probability (natural) of the whole answer with its end, and the answer; the likeliest
first. The prompt goes to the model as it is (see paligemma generate --help). Labels instead of
whole answers, and probabilities: paligemma classify.
"""


def add_compare(commands: Any) -> None:
    """Adds the parsers of these commands."""
    classify = options.add_command(
        commands, "classify", run_classify, "tell which of some labels fits pictures",
        "Compares labels for each picture and gives each of them a probability.", _CLASSIFY,
    )  # fmt: skip
    options.add_pictures(classify)
    classify.add_argument(
        "labels", metavar="LABELS", help='to choose from, after all pictures: "cat ; dog ; bird"'
    )
    classify.add_argument(
        "--question", default=QUESTION, metavar="TEXT",
        help='that the labels are answers to (default: "%(default)s")',
    )  # fmt: skip
    options.add_language(classify)
    classify.add_argument(
        "--top", type=options.positive(1000), metavar="N",
        help="labels to print of each picture (default: all of one picture, 1 of several)",
    )  # fmt: skip

    score = options.add_command(
        commands, "score", run_score, "tell how likely given answers are",
        "Scores answers to a prompt about each picture, or about all of them together.", _SCORE,
    )  # fmt: skip
    options.add_pictures(score)
    score.add_argument("prompt", metavar="PROMPT", help="in quotes, after all pictures")
    score.add_argument(
        "--candidates", nargs="+", action="extend", required=True, metavar="ANSWER",
        help='answers to score, after the prompt; "" is the empty one',
    )  # fmt: skip
    options.add_together(score)

    fields = "label, coverage, labels (label, probability, logprob)"
    options.add_answering(classify, fields, None)
    fields = "candidates (text, logprob, tokens, logprobs)"
    options.add_answering(score, fields, None)
    for parser in (classify, score):
        options.add_frames(parser)
        options.add_model(parser)


def run_classify(args: argparse.Namespace) -> int:
    """`paligemma classify`; returns the exit code."""
    from paligemma_jax.generation.scoring import classify
    from paligemma_jax.processing import prompts
    from paligemma_jax.processing.prompts import check_labels

    check_arguments(args, "labels")
    labels = [label.strip() for label in args.labels.split(";") if label.strip()]
    check_labels(labels)
    prompt = prompts.answer(args.question, args.language)
    top = args.top or (len(labels) if len(args.pictures) == 1 else 1)
    score = _score(args, prompt, labels)

    def ask(pipeline: "Pipeline", pictures: list[Picture]) -> "list[Classification]":
        return [classify(answers) for answers in score(pipeline, pictures)]

    def present(reply: "Answered[Classification]") -> Shown:
        ranked = reply.answer.ranked()[:top]
        lines = [f"{probability:.3f} {_line(label)}" for label, probability in ranked]
        return "\n".join(lines), reply.answer.to_dict()

    return report_each(args, prompt, ask, present)


def run_score(args: argparse.Namespace) -> int:
    """`paligemma score`; returns the exit code."""
    check_arguments(args, "prompt")

    def present(reply: "Answered[list[ScoredAnswer]]") -> Shown:
        ranked = sorted(reply.answer, key=lambda answer: -answer.logprob)
        lines = [f"{answer.logprob:.3f} {_line(answer.text)}" for answer in ranked]
        return "\n".join(lines), {"candidates": [answer.to_dict() for answer in ranked]}

    report = report_together if args.together else report_each
    return report(args, args.prompt, _score(args, args.prompt, args.candidates), present)


def _score(
    args: argparse.Namespace, prompt: str, candidates: list[str]
) -> "Ask[list[ScoredAnswer]]":
    def ask(pipeline: "Pipeline", pictures: list[Picture]) -> "list[list[ScoredAnswer]]":
        entries = [pictures_of(pipeline, picture) for picture in pictures]
        rows = len(pictures)
        return pipeline.score_batch(
            entries, [prompt] * rows, [candidates] * rows, batch_size=args.batch_size
        )

    return ask


def _line(text: str) -> str:
    return "\\n".join(text.splitlines()) or "(empty)"
