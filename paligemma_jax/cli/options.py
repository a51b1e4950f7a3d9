"""Options that several commands share, and how their help looks.

Options for how an answer is chosen, begins and ends, and which of them exclude each other.
"""

import argparse
import math
import re
import textwrap
from collections.abc import Callable
from typing import Any

from paligemma_jax.models.quantization_config import QuantizationConfig

QUANTIZATION_FORMATS = "int8, int4, float8, mixed, or parts such as attention=int8,mlp=int4:128"
DTYPES = ("float32", "bfloat16", "float16")
CONTEXT = 8192  # tokens, Gemma's
MESH_AXES = ("data", "fsdp", "tensor")  # `paligemma_jax.models.sharding.NAMES`, which imports jax
# As `paligemma_jax.pipeline`, `generation.grammar` and `processing.video` have them, which take
# long to import.
MAX_NEW_TOKENS, MAX_OBJECT_TOKENS, MAX_OBJECTS, FRAMES = 128, 512, 100, 16


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


def add_answering(
    parser: argparse.ArgumentParser,
    fields: str = "answer, tokens, logprob",
    max_new_tokens: int | None = MAX_NEW_TOKENS,
) -> None:
    """How pictures are answered and the answers printed; None where nothing is generated."""
    add_json(parser, f"one JSON document a line and picture: file, prompt, {fields}")
    if max_new_tokens is not None:
        add_max_new_tokens(parser, max_new_tokens)
    add_batch_size(parser, "pictures")
    parser.add_argument(
        "--allow-urls", action="store_true", help="a PICTURE may be an http(s) address"
    )


def add_json(parser: argparse.ArgumentParser, words: str) -> None:
    """That answers are printed for programs."""
    parser.add_argument("--json", action="store_true", help=words)


def add_max_new_tokens(parser: argparse.ArgumentParser, default: int = MAX_NEW_TOKENS) -> None:
    """The length of answers."""
    parser.add_argument(
        "--max-new-tokens",
        type=positive(CONTEXT),
        default=default,
        metavar="N",
        help="where an answer without end is cut (default: %(default)s)",
    )


def add_batch_size(parser: argparse.ArgumentParser, of: str) -> None:
    """How many `of` what are answered at once."""
    parser.add_argument(
        "--batch-size",
        type=positive(1024),
        default=8,
        metavar="N",
        help=f"{of} that go through the model together (default: %(default)s)",
    )


def add_frames(parser: argparse.ArgumentParser) -> None:
    """That videos are taken for pictures."""
    parser.add_argument(
        "--frames",
        type=positive(256),
        default=FRAMES,
        metavar="N",
        help="taken of a PICTURE that is a video, spread evenly (default: %(default)s)",
    )


def add_together(parser: argparse.ArgumentParser) -> None:
    """That all pictures belong to one prompt."""
    parser.add_argument(
        "--together", action="store_true", help="ask once about all pictures at the same time"
    )


def add_language(parser: argparse.ArgumentParser) -> None:
    """In which language to ask."""
    parser.add_argument(
        "--language", default="en", metavar="CODE", help="of the answer (default: en)"
    )


def add_model(
    parser: argparse.ArgumentParser, *, weights: bool = True, masks: bool = False
) -> None:
    """Which model answers; `masks` where it needs a mask codec for that."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="demo",
        metavar="MODEL",
        help="demo (the default), a published name (see: paligemma models), which is downloaded, a "
        "Hugging Face directory, a big_vision .npz, or a directory written by paligemma convert",
    )
    if weights:
        group.add_argument(
            "--dtype",
            choices=DTYPES,
            help="of weights and activations (default: float32 for demo, else bfloat16)",
        )
        add_quantize(group, "round the language model's weights to so many bits as they are read")
        group.add_argument(
            "--adapter", metavar="DIR", help="a PEFT directory (LoRA) to add to the weights"
        )
        group.add_argument(
            "--mesh", type=mesh, metavar="AXES",
            help="split the model over all devices, such as tensor=4, or data=2,tensor=-1; -1 is "
            "what is left",
        )  # fmt: skip
    group.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.model, where none lies beside the weights"
    )
    if masks:
        add_mask_codec(group)
    group.add_argument(
        "--resolution",
        type=positive(1 << 14),
        metavar="N",
        help="pixels a side that pictures are resized to (default: as the model was trained)",
    )


def add_quantize(group: Any, words: str) -> None:
    """How to quantize weights."""
    group.add_argument(
        "--quantize", type=quantization, metavar="FORMAT", help=f"{words}: {QUANTIZATION_FORMATS}"
    )


def add_mask_codec(group: Any) -> None:
    """What turns <seg> tokens into masks; `group` is a parser, or a part of one."""
    group.add_argument(
        "--mask-codec",
        metavar="FILE",
        help="such as vae-oid.npz: makes masks of <seg> tokens, where none lies beside the weights",
    )


def positive(limit: int) -> Callable[[str], int]:
    """Type of an option that is a whole number from 1 to `limit`."""
    return _whole_number(1, limit)


def seed(text: str) -> int:
    """Type of an option that starts a random number generator."""
    return _whole_number(0, 2**64 - 1)(text)


def count(limit: int) -> Callable[[str], int]:
    """Type of an option that is a whole number from 0 to `limit`."""
    return _whole_number(0, limit)


def temperature(text: str) -> float:
    """Type of an option that is a finite number, not negative."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no temperature; 0, 0.7 or 1 would fit")
    return value


def exponent(text: str) -> float:
    """Type of an option that is a finite number."""
    value = _number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no exponent; 0, 0.6 or 1 would fit")
    return value


def some_text(text: str) -> str:
    """Type of an option that is text, not empty."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text is in every answer; some letters fit")
    return text


def quantization(text: str) -> str:
    """Type of an option that names formats of quantized weights."""
    try:
        QuantizationConfig.of(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e
    return text


def mesh(text: str) -> dict[str, int]:
    """Type of an option that gives sizes of the axes of a mesh."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in MESH_AXES or name in sizes or not re.fullmatch(r"-1|[1-9]\d{0,5}", size):
            axes = ", ".join(MESH_AXES)
            raise argparse.ArgumentTypeError(
                f"{part!r} is no size of an axis; the axes are {axes}, such as tensor=4"
            )
        sizes[name] = int(size)
    return sizes


def share(text: str) -> float:
    """Type of an option that is a number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1; 0.5 would fit")
    return value


def overlap(text: str) -> float:
    """Type of an option that is a number above 0, at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and up to 1; 0.7 fits")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.isdecimal() and len(text) < 21 else -1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high:,}")
        return value

    return parse


MAX_BEAMS = 256
_DRAWS = ("--top-k", "--top-p", "--min-p")
_EXCLUDED = {  # option: those that do not go with it, and why
    "--beams": (
        ("--temperature", *_DRAWS, "--best-of", "--min-new-tokens", "--stop", "--stream"),
        "it searches for the likeliest whole answers",
    ),
    "--stream": (("--json", "--best-of", "--logprobs"), "it prints text as it comes"),
    "--logprobs": (("--beams",), "a search keeps the log-probability of whole answers only"),
}


def add_choosing(parser: argparse.ArgumentParser) -> None:
    """Adds them all, in a group of their own."""
    group = parser.add_argument_group("how the answer is chosen")

    def number(name: str, kind: Any, metavar: str, words: str, default: Any = None) -> None:
        group.add_argument(name, type=kind, default=default, metavar=metavar, help=words)

    number(
        "--temperature",
        temperature,
        "T",
        "draw tokens; 0, the default, takes the likeliest, above 1 evens out the chances",
    )
    number("--top-k", positive(1 << 20), "K", "draw from the K likeliest tokens")
    number("--top-p", share, "P", "draw from the likeliest that together have probability P")
    number("--min-p", share, "P", "draw from those at least P times as likely as the first")
    number("--seed", seed, "N", "of the draws (default: 0)", 0)
    number("--best-of", positive(1024), "N", "draw N answers, and keep the likeliest")
    number(
        "--beams",
        positive(MAX_BEAMS),
        "N",
        "search for the likeliest answer with N beginnings at a time",
    )
    number(
        "--alpha",
        exponent,
        "A",
        "rank these by logprob / tokens^A: 0, the default, favours short answers, 1 none",
    )
    number(
        "--min-new-tokens",
        count(CONTEXT),
        "N",
        "an answer does not end before (default: %(default)s)",
        0,
    )
    group.add_argument(
        "--stop", action="append", type=some_text, metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )  # fmt: skip
    group.add_argument(
        "--begin", default="", metavar="TEXT",
        help="of the answer; what comes after it is printed. End it with a word, without a space",
    )  # fmt: skip
    group.add_argument("--stream", action="store_true", help="print the answer while it is made")
    group.add_argument(
        "--logprobs", action="store_true",
        help="show the log-probability (natural) of every token of the answer",
    )  # fmt: skip


def check_choosing(args: argparse.Namespace) -> None:
    """Ends the command with a usage error if options contradict each other."""
    for option, (others, reason) in _EXCLUDED.items():
        wrong = [other for other in others if _given(args, other)]
        if _given(args, option) and wrong:
            args.usage_error(
                f"{option} does not go with {wrong[0]}: {reason}; leave one of them out"
            )
    draws = [option for option in (*_DRAWS, "--best-of") if _given(args, option)]
    if args.temperature == 0 and draws:
        args.usage_error(
            f"{draws[0]} draws, and --temperature 0 takes the likeliest token; leave one of them "
            "out, or choose a higher temperature"
        )
    if args.alpha is not None and not (args.best_of or args.beams):
        args.usage_error("--alpha ranks several answers; it goes with --best-of or --beams")
    if args.min_new_tokens > args.max_new_tokens:
        args.usage_error(
            f"--min-new-tokens {args.min_new_tokens} is more than --max-new-tokens "
            f"{args.max_new_tokens}"
        )


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """How tokens are chosen, as far as the options say, as keyword arguments of the pipeline."""
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    return {name: value for name, value in given.items() if value is not None}


def _given(args: argparse.Namespace, option: str) -> bool:
    """Whether it asks for anything; 0 does for a share, not for a temperature."""
    value = getattr(args, option.removeprefix("--").replace("-", "_"))
    if option in _DRAWS:
        return value is not None
    return bool(value)
