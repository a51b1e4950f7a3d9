"""Options that several commands share, their types, and how help looks."""

import argparse
import textwrap
from collections.abc import Callable
from typing import Any

QUANTIZATION_FORMATS = "int8, int4, float8, mixed, or by part such as attention=int8,mlp=int4:128"
DTYPES = ("float32", "bfloat16", "float16")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves examples as they are written."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if action.nargs == argparse.PARSER:  # argparse forgets that the commands are indented
            self._action_max_length += 2


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
    epilog: str,
    *,
    json: str | None = None,
) -> argparse.ArgumentParser:
    """The parser of a command.

    Args:
      commands: what `add_subparsers` gave.
      run: the command; returns the exit code.
      json: what --json prints, for a command that has it.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 88),
        epilog=epilog,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run, usage_error=parser.error)
    group = parser.add_argument_group("output options")
    if json is not None:
        group.add_argument("--json", action="store_true", help=json)
    group.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show progress on standard error (default: on a terminal)",
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def json_lines(fields: str) -> str:
    """Help of --json for a command about images."""
    return f"JSON Lines, one object per image: file, prompt, {fields}"


def add_images(
    parser: argparse.ArgumentParser,
    words: tuple[str, str] | None = None,
    *,
    frames: bool = False,
    multi_image: bool = False,
) -> None:
    """The images that a command is about, and how they are read.

    Args:
      words: name and help of the argument that follows the images, such as QUESTION.
      frames: videos are taken too.
      multi_image: several images may belong to one prompt.
    """
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image file, or - for standard input; several are processed one by one",
    )
    if words is not None:
        name, help = words
        parser.add_argument(name, metavar=name.upper(), help=help)
    group = parser.add_argument_group("input options")
    if multi_image:
        group.add_argument(
            "--multi-image", action="store_true", help="one prompt about all images together"
        )
    if frames:
        group.add_argument(
            "--frames", type=at_least(1), default=16, metavar="N",
            help="frames of an IMAGE that is a video, spread evenly (default: %(default)s)",
        )  # fmt: skip
    group.add_argument("--allow-urls", action="store_true", help="an IMAGE may be an http(s) URL")
    add_batch_size(group, "images")


def add_batch_size(group: Any, of: str) -> None:
    """How many `of` what go through the model together; `group` is a parser, or a part of one."""
    group.add_argument(
        "--batch-size", type=at_least(1), default=8, metavar="N",
        help=f"{of} that go through the model together (default: %(default)s)",
    )  # fmt: skip


# Fields of GenerationConfig as options of the same name: type, metavar, help.
_GENERATION: dict[str, tuple[type, str, str]] = {
    "max_new_tokens": (int, "N", "maximum number of new tokens (default: 128)"),
    "min_new_tokens": (int, "N", "minimum number of new tokens (default: 0)"),
    "temperature": (float, "T", "0, the default, decodes greedily, 1 samples, more flattens the "
                    "distribution; the default is 1 with --top-k, --top-p, --min-p or --best-of"),
    "top_k": (int, "K", "sample from the K most probable tokens"),
    "top_p": (float, "P", "sample from the most probable tokens that together have probability P"),
    "min_p": (float, "P", "sample from tokens at least P times as probable as the first"),
    "seed": (int, "N", "random seed (default: 0)"),
    "length_penalty": (float, "A", "rank by logprob / tokens^A with --best-of or --num-beams: 0, "
                       "the default, favors short sequences, 1 is the mean of a token"),
    "num_return_sequences": (int, "N", "sequences that beam search returns, at most as many as "
                             "beams (default: 1, and all with --json)"),
    "top_logprobs": (int, "N", "report the N most probable tokens of every step in --json"),
}  # fmt: skip


def add_generation(parser: argparse.ArgumentParser) -> None:
    """How text is generated."""
    group = parser.add_argument_group("generation options")
    for name, (kind, metavar, help) in _GENERATION.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=help)
    group.add_argument(
        "--stop", action="append", metavar="TEXT",
        help="end before this text; may be given several times",
    )  # fmt: skip
    group.add_argument(
        "--answer-prefix", metavar="TEXT",
        help="continue this beginning of the answer, which ends with a word, without a space",
    )  # fmt: skip
    group.add_argument(
        "--early-stopping", action=argparse.BooleanOptionalAction,
        help="end beam search by big_vision's rule, the default, or by that of Hugging Face",
    )  # fmt: skip
    group.add_argument(
        "--logprobs", action="store_true", help="show the log-probability (natural) of every token"
    )
    method = group.add_mutually_exclusive_group()
    method.add_argument(
        "--best-of", type=int, metavar="N", help="sample N times, and keep the most probable"
    )
    method.add_argument("--num-beams", type=int, metavar="N", help="beam search with N beams")
    method.add_argument("--stream", action="store_true", help="print text as it is generated")


def add_max_new_tokens(parser: argparse.ArgumentParser, default: int) -> None:
    """The length of what is generated; `default` is that of the library."""
    help = f"maximum number of new tokens (default: {default})"
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=help)


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of them, as keyword arguments of the methods of `Pipeline`."""
    names = (*_GENERATION, "stop", "num_beams", "early_stopping")
    values = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def add_language(parser: argparse.ArgumentParser) -> None:
    """The language of prompt and answer."""
    parser.add_argument(
        "--language", default="en", metavar="CODE", help="language of the answer (default: en)"
    )


def add_model(
    parser: argparse.ArgumentParser, *, weights: bool = True, mask_codec: bool = False
) -> None:
    """The model, and how it is loaded; without `weights` for commands that only configure it."""
    group = parser.add_argument_group("model options")
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
        add_quantize(group, "quantize the weights as they are loaded")
        group.add_argument(
            "--adapter", metavar="DIR", help="PEFT directory (LoRA) to add to the weights"
        )
        group.add_argument(
            "--mesh", type=mesh, metavar="AXES",
            help="shard the model over all devices, such as tensor=4, or data=2,tensor=-1; -1 is "
            "what is left",
        )  # fmt: skip
    add_tokenizer(group)
    if mask_codec:
        add_mask_codec(group)
    group.add_argument(
        "--resolution", type=at_least(1), metavar="N",
        help="resize images to N x N pixels (default: as the model was trained)",
    )  # fmt: skip


def add_quantize(group: Any, words: str) -> None:
    """How to quantize weights."""
    group.add_argument("--quantize", metavar="FORMAT", help=f"{words}: {QUANTIZATION_FORMATS}")


def add_tokenizer(group: Any) -> None:
    """The tokenizer of weights that have none beside them."""
    group.add_argument(
        "--tokenizer", metavar="FILE",
        help="tokenizer.model or tokenizer.json, if the checkpoint has none",
    )  # fmt: skip


def add_mask_codec(group: Any) -> None:
    """The mask codec of weights that have none beside them."""
    group.add_argument(
        "--mask-codec", metavar="FILE",
        help="such as vae-oid.npz: decodes <seg> tokens to masks, if the checkpoint has none",
    )  # fmt: skip


def at_least(minimum: int) -> Callable[[str], int]:
    """Type of an option that is an integer of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {minimum}, got {text!r}"
            )
        return value

    return parse


def fraction(text: str) -> float:
    """Type of an option that is a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def positive_fraction(text: str) -> float:
    """Type of an option that is a number above 0, and at most 1."""
    if not (value := fraction(text)):
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text!r}")
    return value


def mesh(text: str) -> dict[str, int]:
    """Type of an option that gives the sizes of mesh axes: "data=2,tensor=-1"."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        sizes = {name.strip(): int(size) for name, size in pairs}
    except ValueError:
        sizes = {}
    if not sizes or not sizes.keys() <= {"data", "fsdp", "tensor"}:
        raise argparse.ArgumentTypeError(
            f"expected sizes of the axes data, fsdp and tensor, such as tensor=4, got {text!r}"
        )
    return sizes
