"""Options for how an answer is chosen, begins and ends, and which of them exclude each other."""

import argparse
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options

if TYPE_CHECKING:
    from paligemma_jax.generation.sampling import Reshaping, Sampler

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
        options.temperature,
        "T",
        "draw tokens; 0, the default, takes the likeliest, above 1 evens out the chances",
    )
    number("--top-k", options.positive(1 << 20), "K", "draw from the K likeliest tokens")
    number(
        "--top-p", options.share, "P", "draw from the likeliest that together have probability P"
    )
    number("--min-p", options.share, "P", "draw from those at least P times as likely as the first")
    number("--seed", options.seed, "N", "of the draws (default: 0)", 0)
    number("--best-of", options.positive(1024), "N", "draw N answers, and keep the likeliest")
    number(
        "--beams",
        options.positive(MAX_BEAMS),
        "N",
        "search for the likeliest answer with N beginnings at a time",
    )
    number(
        "--alpha",
        options.exponent,
        "A",
        "rank these by logprob / tokens^A: 0, the default, favours short answers, 1 none",
    )
    number(
        "--min-new-tokens",
        options.count(options.CONTEXT),
        "N",
        "an answer does not end before (default: %(default)s)",
        0,
    )
    group.add_argument(
        "--stop", action="append", type=options.some_text, metavar="TEXT",
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


def sampler_of(args: argparse.Namespace) -> "Sampler":
    """Temperature, top-k, top-p and min-p, in this order, as far as they are asked for."""
    from paligemma_jax.generation import sampling

    steps: list[Reshaping] = []
    if args.temperature:
        steps.append(sampling.Temperature(temperature=args.temperature))
    if args.top_k is not None:
        steps.append(sampling.TopK(k=args.top_k))
    if args.top_p is not None:
        steps.append(sampling.Nucleus(p=args.top_p))
    if args.min_p is not None:
        steps.append(sampling.MinP(p=args.min_p))
    if steps:
        return sampling.Chain(steps)
    return sampling.Temperature() if args.best_of else sampling.Greedy()


def _given(args: argparse.Namespace, option: str) -> bool:
    """Whether it asks for anything; 0 does for a share, not for a temperature."""
    value = getattr(args, option.removeprefix("--").replace("-", "_"))
    if option in _DRAWS:
        return value is not None
    return bool(value)
