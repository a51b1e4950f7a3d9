"""`paligemma classify` and `paligemma score`: how likely given answers are."""

import argparse
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.asking import Answered, Ask, pictures_of
from paligemma_jax.cli.pictures import Picture, check_arguments
from paligemma_jax.cli.report import Shown, report_each, report_together

if TYPE_CHECKING:
    from paligemma_jax.generation.classifying import Classification
    from paligemma_jax.generation.scoring import ScoredAnswer
    from paligemma_jax.pipeline import Pipeline

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


def add(commands: Any) -> None:
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
    from paligemma_jax.generation.classifying import classify
    from paligemma_jax.processing import prompts
    from paligemma_jax.processing.candidates import check_labels

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
