"""Commands that answer in text: caption, answer, ocr, count, generate, text, classify, score."""

import argparse
import contextlib
import itertools
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from paligemma_jax.cli import options
from paligemma_jax.cli.files import Input, check_arguments, count_inputs, read_inputs
from paligemma_jax.cli.output import (
    Shown,
    load_pipeline,
    print_result,
    run_on_images,
    status,
)
from paligemma_jax.errors import ConfigError, PaliGemmaError, UnexpectedAnswerError

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
  paligemma answer photo.jpg "what color is the car?"
  paligemma answer photo.jpg "was ist das?" --language de
  paligemma answer one.jpg two.jpg "is there a dog?"                    an answer for each image
  paligemma answer one.jpg two.jpg "are these the same?" --multi-image  one answer about both
  paligemma answer clip.mp4 "what is the dog doing?" --frames 8         one answer about 8 frames

A video (.mp4, .webm, .mov, .mkv, .avi) is several images of one prompt. Reading it takes the extra
"video": pip install "paligemma-jax[video]"

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

Write the plural, which the prompt takes as it is. An answer that is not a number is an error (exit
code 1); paligemma answer prints the model's own words.
"""
_GENERATE = """\
Examples:
  paligemma generate photo.jpg "caption en"
  paligemma generate photo.jpg "describe en" --stream --max-new-tokens 256
  paligemma generate photo.jpg "describe en" --temperature 0.7 --top-p 0.9 --seed 1
  paligemma generate photo.jpg "caption en" --answer-prefix "a photo of" --stop .
  paligemma generate photo.jpg "caption en" --num-beams 4 --length-penalty 0.6 --json
  paligemma generate one.jpg two.jpg "answer en are these the same?" --multi-image

The prompt goes to the model as it is. PaliGemma's prompts:
  caption LANG                 a short caption                          (all models)
  answer LANG QUESTION         a short answer
  ocr                          the text in the image
  detect THING ; THING         boxes, as <loc0000> to <loc1023>: top, left, bottom, right
  segment THING ; THING        boxes and mask tokens
  cap LANG                     a very short, raw caption                (pt models)
  describe LANG                a longer caption
  question LANG ANSWER         a question that has this answer
  caption <loc...> (four)      a caption of a region

--temperature, --top-k, --top-p and --min-p apply in this order. Prompts without an image:
paligemma text
"""
_TEXT = """\
Examples:
  paligemma text "answer en what is two plus two?"
  paligemma text "question one" "question two" --json
  paligemma text "ocr" --answer-prefix "the red" --best-of 4

PaliGemma was trained on prompts with images; its answer without one shows what it would say
whatever the image is. Prompts with images: paligemma generate
"""
_CLASSIFY = """\
Examples:
  paligemma classify photo.jpg "cat ; dog ; bird"
  paligemma classify *.jpg "cat ; dog" --json > labels.jsonl
  paligemma classify photo.jpg "red ; blue" --question "what color is the car?"
  paligemma classify photo.jpg "chat ; chien" --language fr --question "quel est cet animal ?"

A line is: probability label, the most probable first; of several images only that one (--top).
Probabilities are those of the labels compared with each other, and sum to 1. Whether the model
would generate any of them by itself says "coverage" in JSON, from 0 to 1.
"""
_SCORE = """\
Examples:
  paligemma score photo.jpg "answer en is it a dog?" --candidates yes no
  paligemma score photo.jpg "caption en" --candidates "a dog on grass" "a cat" --json
  paligemma score a.jpg b.jpg "answer en are these the same?" --multi-image --candidates yes no

A line is: log-probability (natural) of the whole candidate with its end, and the candidate; the
most probable first. The prompt goes to the model as it is (see paligemma generate --help). For
labels and their probabilities: paligemma classify.
"""
_FLAGS = {"best_of": "--best-of", "beam_search": "--num-beams"}  # of methods of Pipeline
_FIELDS = "text, tokens, logprob, finish_reason, prompt_tokens, image_tokens"


class Generated(NamedTuple):
    """What was generated for a prompt, best first, and the pieces of the best one's tokens.

    Beam search may find nothing.
    """

    generations: "list[Generation]"
    pieces: list[str]

    @property
    def text(self) -> str | None:
        """The best text."""
        return self.generations[0].text if self.generations else None


def add_text_commands(commands: Any) -> None:
    """Adds the parsers of caption, answer, ocr, count and generate."""
    json = options.json_lines(_FIELDS)
    caption = options.add_command(
        commands, "caption", run_prompt, "describe images", "Describes each image in a sentence.",
        _CAPTION, json=json,
    )  # fmt: skip
    options.add_images(caption, frames=True)
    options.add_language(caption)
    answer = options.add_command(
        commands, "answer", run_prompt, "answer a question about images",
        "Answers a question about each image, or about all of them together.", _ANSWER, json=json,
    )  # fmt: skip
    words = "question", "in quotes, after all images"
    options.add_images(answer, words, frames=True, multi_image=True)
    options.add_language(answer)
    ocr = options.add_command(
        commands, "ocr", run_prompt, "read the text in images", "Reads the text in each image.",
        _OCR, json=json,
    )  # fmt: skip
    options.add_images(ocr)
    count = options.add_command(
        commands, "count", run_prompt, "count objects in images",
        "Counts objects of one kind in each image.", _COUNT,
        json=options.json_lines(f"{_FIELDS}, count"),
    )  # fmt: skip
    options.add_images(count, ("things", "what to count, after all images"))
    generate = options.add_command(
        commands, "generate", run_prompt, "generate from your own prompt",
        "Answers a prompt of PaliGemma's own language about each image, or about all together.",
        _GENERATE, json=json,
    )  # fmt: skip
    words = "prompt", "in quotes, after all images"
    options.add_images(generate, words, frames=True, multi_image=True)
    for parser in (caption, answer, ocr, count, generate):
        options.add_generation(parser)
        options.add_model(parser)


def run_prompt(args: argparse.Namespace) -> int:
    """`paligemma caption`, `answer`, `ocr`, `count` and `generate`; returns the exit code."""
    from paligemma_jax.processing import prompts

    words = {"answer": "question", "count": "things", "generate": "prompt"}.get(args.command)
    check_arguments(args, words)
    _check_generation(args)
    if args.command == "caption":
        prompt = prompts.caption(args.language)
    elif args.command == "answer":
        prompt = prompts.answer(args.question, args.language)
    elif args.command == "count":
        prompt = prompts.count(args.things)
    else:
        prompt = prompts.ocr() if args.command == "ocr" else args.prompt
    if args.stream:
        return _stream_images(args, prompt)

    def ask(pipeline: "Pipeline", inputs: list[Input]) -> list[Generated]:
        images = [model_images(pipeline, one) for one in inputs]
        indices = [one.index for one in inputs]
        return _generate(args, pipeline, images, [prompt] * len(inputs), indices)

    def show(one: Input, generated: Generated) -> Shown:
        text, fields = _show(args, generated)
        if args.command == "count":
            number = prompts.parse_number(text := generated.generations[0].text)
            if number is None:
                raise UnexpectedAnswerError(
                    f"{one.name}: expected a number, got {text!r}. For the model's own "
                    "words: paligemma answer IMAGE QUESTION"
                )
            text, fields["count"] = str(number), number
        return text, fields

    return run_on_images(args, prompt, ask, show)


def model_images(pipeline: "Pipeline", one: Input) -> Any:
    """What methods of the pipeline take; many frames are encoded some at a time."""
    return one.images[0] if len(one.images) == 1 else pipeline.encode(one.images)


def _check_generation(args: argparse.Namespace) -> None:
    """Errors in options are of usage, and come before a model is loaded."""
    if args.stream and (args.json or args.logprobs or args.command == "count"):
        args.usage_error("argument --stream: not allowed with --json, --logprobs or count")
    if args.top_logprobs is not None and not args.json:
        args.usage_error("argument --top-logprobs: only with --json")
    from paligemma_jax.generation.config import METHOD_FIELDS, resolve_config
    from paligemma_jax.generation.generate import best_of_config

    method, _ = _method(args)
    settings = options.generation_options(args)
    for name in settings:
        if name not in METHOD_FIELDS[method]:
            takes = [flag for other, flag in _FLAGS.items() if name in METHOD_FIELDS[other]]
            given = _FLAGS.get(method)
            wrong = f"not allowed with {given}" if given else f"only with {' or '.join(takes)}"
            args.usage_error(f"argument {_flag(name)}: {wrong}")
    try:
        if method == "best_of":
            best_of_config(args.best_of, None, settings)
        else:
            resolve_config(method, None, settings)
    except ConfigError as e:
        names = "|".join(METHOD_FIELDS["generate"] | METHOD_FIELDS["beam_search"])
        message = re.sub(rf"\b({names})\b", lambda match: _flag(match[1]), str(e))
        message = re.sub(r"\bn(?=[:=])", "--best-of", message)
        args.usage_error(message)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _method(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The method of `Pipeline` that the options ask for, and an argument that only it takes."""
    if args.best_of is not None:
        return "best_of", {"n": args.best_of}
    return ("generate" if args.num_beams is None else "beam_search"), {}


def _generate(
    args: argparse.Namespace,
    pipeline: "Pipeline",
    images: Sequence[Any] | None,
    prompts: Sequence[str],
    indices: Sequence[int],
) -> list[Generated]:
    """Generates for each prompt; prompt i samples from the seed + indices[i]."""
    method, settings = _method(args)
    settings |= options.generation_options(args) | {"batch_size": args.batch_size}
    if args.answer_prefix:
        settings["answer_prefixes"] = [args.answer_prefix] * len(prompts)
    if method != "beam_search":
        settings["seed"] = [(settings.get("seed", 0) + index) % 2**64 for index in indices]
    elif args.json:  # all that were found
        settings.setdefault("num_return_sequences", args.num_beams)
    found = getattr(pipeline, method)(images, prompts, **settings)
    ranked = [[one] for one in found] if method == "generate" else found
    piece = pipeline.processor.tokenizer.piece
    return [Generated(row, [piece(t) for one in row[:1] for t in one.tokens]) for row in ranked]


def _show(args: argparse.Namespace, generated: Generated) -> Shown:
    """The best generation as text, and all of them as fields."""
    generations, pieces = generated
    if not generations:
        raise UnexpectedAnswerError(
            "beam search found no answer that ends within the maximum number of tokens. Pass a "
            "larger --max-new-tokens or --num-beams, or --no-early-stopping"
        )
    best = generations[0]
    lines = [best.text]
    if args.logprobs:
        lines += [f"{p:.4f} {piece}" for p, piece in zip(best.logprobs, pieces, strict=True)]
    fields = _fields(args, best)
    if args.answer_prefix:
        fields["answer_prefix"] = args.answer_prefix
    if args.best_of or args.num_beams:
        fields["generations"] = [_fields(args, one) for one in generations]
    return "\n".join(lines), fields


def _fields(args: argparse.Namespace, generation: "Generation") -> dict[str, Any]:
    """A generation for JSON: what is known of each, and what was asked for."""
    fields = {name: getattr(generation, name) for name in _FIELDS.split(", ")}
    asked = {
        "score": generation.score is not None,
        "stop": args.stop,
        "logprobs": args.logprobs,
        "top_logprobs": args.top_logprobs,
    }
    return fields | {name: getattr(generation, name) for name, given in asked.items() if given}


def _stream_images(args: argparse.Namespace, prompt: str) -> int:
    pipeline, failures = None, 0
    for index in range(count_inputs(args)):
        (one,) = read_inputs(args, index, index + 1)
        if one.error is not None:
            print_result(args, one.label, None, {}, one.error)
            failures += 1
            continue
        pipeline = pipeline or load_pipeline(args)
        _stream(args, pipeline, model_images(pipeline, one), prompt, index, one.label)
    return 1 if failures else 0


def _stream(
    args: argparse.Namespace, pipeline: "Pipeline", images: Any, prompt: str, index: int,
    label: str | None,
) -> None:  # fmt: skip
    """Prints one text as it is generated; `label` begins its lines."""
    settings = options.generation_options(args)
    settings["seed"] = (settings.get("seed", 0) + index) % 2**64
    if args.answer_prefix:
        settings["answer_prefix"] = args.answer_prefix
    prefix = f"{label}: " if label else ""
    with contextlib.closing(pipeline.stream(images, prompt, **settings)) as events:
        with status(args, None if index else "compiling and generating"):
            first = next(events, "")
        print(prefix, end="")
        try:
            for event in itertools.chain([first], events):
                print(str(event).replace("\n", f"\n{prefix}"), end="", flush=True)
        finally:
            print(flush=True)  # also where it is interrupted


def add_text(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands, "text", run_text, "generate from a prompt without an image",
        "Answers prompts without an image, in PaliGemma's prompt language.", _TEXT,
        json=f"JSON Lines, one object per prompt: prompt, {_FIELDS}",
    )  # fmt: skip
    parser.add_argument(
        "prompts", nargs="+", metavar="PROMPT",
        help="in quotes; several are processed one by one",
    )  # fmt: skip
    options.add_batch_size(parser, "prompts")
    options.add_generation(parser)
    options.add_model(parser)


def run_text(args: argparse.Namespace) -> int:
    """`paligemma text`; returns the exit code."""
    for prompt in filter(os.path.isfile, args.prompts):
        args.usage_error(f"{prompt} is a file; with images: paligemma generate {prompt} PROMPT")
    _check_generation(args)
    pipeline = load_pipeline(args)
    labels = args.prompts if len(args.prompts) > 1 else [None]
    if args.stream:
        for index, (prompt, label) in enumerate(zip(args.prompts, labels, strict=True)):
            _stream(args, pipeline, None, prompt, index, label)
        return 0
    with status(args, "compiling and generating"):
        found = _generate(args, pipeline, None, args.prompts, range(len(args.prompts)))
    failures = 0
    for prompt, label, generated in zip(args.prompts, labels, found, strict=True):
        text, fields, error = None, {}, None
        try:
            text, fields = _show(args, generated)
        except PaliGemmaError as e:
            error = e
        failures += error is not None
        print_result(args, label, text, {"prompt": prompt} | fields, error)
    return 1 if failures else 0


def add_scoring(commands: Any) -> None:
    """Adds the parsers of classify and score."""
    classify = options.add_command(
        commands, "classify", run_classify, "classify images with your own labels",
        "Compares labels for each image and gives each of them a probability.", _CLASSIFY,
        json=options.json_lines("label, coverage, labels (label, probability, logprob)"),
    )  # fmt: skip
    words = "labels", 'to choose from, after all images: "cat ; dog ; bird"'
    options.add_images(classify, words, frames=True)
    classify.add_argument(
        "--question", default="what is in the image?", metavar="TEXT",
        help='that the labels are answers to (default: "%(default)s")',
    )  # fmt: skip
    options.add_language(classify)
    classify.add_argument(
        "--top", type=options.at_least(1), metavar="N",
        help="labels to print per image (default: all of one image, 1 of several)",
    )  # fmt: skip
    score = options.add_command(
        commands, "score", run_score, "score given answers by log-probability",
        "Scores answers to a prompt about each image, or about all of them together.", _SCORE,
        json=options.json_lines("candidates (text, logprob, tokens, logprobs)"),
    )  # fmt: skip
    words = "prompt", "in quotes, after all images"
    options.add_images(score, words, frames=True, multi_image=True)
    score.add_argument(
        "--candidates", nargs="+", action="extend", required=True, metavar="ANSWER",
        help='answers to score, after the prompt; "" is the empty one',
    )  # fmt: skip
    for parser in (classify, score):
        options.add_model(parser)


def run_classify(args: argparse.Namespace) -> int:
    """`paligemma classify`; returns the exit code."""
    from paligemma_jax.generation.scoring import classify
    from paligemma_jax.processing import prompts

    check_arguments(args, "labels")
    labels = split_labels(args.labels)
    prompts.check_labels(labels)
    prompt = prompts.answer(args.question, args.language)
    top = args.top or (len(labels) if len(args.images) == 1 else 1)

    def ask(pipeline: "Pipeline", inputs: list[Input]) -> "list[Classification]":
        return [classify(scored) for scored in _score(args, pipeline, inputs, prompt, labels)]

    def show(_: Input, result: "Classification") -> Shown:
        lines = [f"{p:.3f} {_one_line(label)}" for label, p in result.ranked()[:top]]
        return "\n".join(lines), result.to_dict()

    return run_on_images(args, prompt, ask, show)


def run_score(args: argparse.Namespace) -> int:
    """`paligemma score`; returns the exit code."""
    check_arguments(args, "prompt")

    def ask(pipeline: "Pipeline", inputs: list[Input]) -> "list[list[ScoredAnswer]]":
        return _score(args, pipeline, inputs, args.prompt, args.candidates)

    def show(_: Input, result: "list[ScoredAnswer]") -> Shown:
        ranked = sorted(result, key=lambda answer: -answer.logprob)
        lines = [f"{answer.logprob:.3f} {_one_line(answer.text)}" for answer in ranked]
        return "\n".join(lines), {"candidates": [answer.to_dict() for answer in ranked]}

    return run_on_images(args, args.prompt, ask, show)


def split_labels(text: str) -> list[str]:
    """The labels of "cat ; dog"."""
    return [label.strip() for label in text.split(";") if label.strip()]


def _score(
    args: argparse.Namespace, pipeline: "Pipeline", inputs: list[Input], prompt: str,
    candidates: list[str],
) -> "list[list[ScoredAnswer]]":  # fmt: skip
    images, count = [model_images(pipeline, one) for one in inputs], len(inputs)
    return pipeline.score_batch(
        images, [prompt] * count, [candidates] * count, batch_size=args.batch_size
    )


def _one_line(text: str) -> str:
    return "\\n".join(text.splitlines()) or "(empty)"
