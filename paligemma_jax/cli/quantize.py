"""`paligemma quantize`: what rounding a model's weights saves, and what it costs."""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.progress import byte_bar, status
from paligemma_jax.cli.sizes import data_size

if TYPE_CHECKING:
    from paligemma_jax.demo.quantization_report import QuantizationReport

SCENES, PROMPTS, CALIBRATION = 500, 200, 400

_EPILOG = """\
Examples:
  paligemma quantize demo --report                    the demo model in 8 and in 4 bits
  paligemma quantize demo --report --recipe int4 --scenes 100
  paligemma quantize paligemma2-3b-mix-448 --report   without scores, which are the demo's

Nothing is written: weights are rounded as they are read, by every command that has --quantize.

The model answers prompts about drawn scenes; then it and the rounded model read those answers.
"KL" is how far the distribution of the next token moves (Kullback-Leibler divergence, nats a
token), "same token" how often the likeliest one stays. "calibr." is rounded to make up for itself
(GPTQ): quantize(model, "int4", inputs=measure_inputs(...)). Scores are those of the demo
benchmark: python -m paligemma_jax.demo.evaluate. Tokens a second are those of one answer, while
this ran.
"""


def add(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "quantize",
        run,
        "measure what weights of 8 or 4 bits change",
        "Compares a model with itself after its weights were rounded: memory, speed, what it would "
        "say next, and how well it does.",
        _EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="demo, or a checkpoint of any format")
    parser.add_argument(
        "--report", action="store_true", required=True, help="measure and print; nothing else yet"
    )
    parser.add_argument(
        "--recipe", action="append", choices=options.RECIPES,
        help="may be repeated (default: int8 and int4)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=options.DTYPES, default="bfloat16",
        help="of the weights before, and of activations (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--scenes", type=options.count(100_000), metavar="N",
        help=f"of the demo benchmark (default: {SCENES} for demo, else 0: no scores)",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", type=options.positive(100_000), default=PROMPTS, metavar="N",
        help="whose answers are compared token by token (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibrate", type=options.count(100_000), metavar="N",
        help="prompts about other pictures; 4 bits are also rounded by what the model multiplies "
        f"then (default: {CALIBRATION} for demo, else 0: not)",
    )  # fmt: skip
    options.add_json(parser, "one JSON document")


def run(args: argparse.Namespace) -> int:
    """`paligemma quantize`; returns the exit code."""
    from paligemma_jax.demo.quantization_report import report
    from paligemma_jax.pretrained import from_pretrained
    from paligemma_jax.resolve import DEMO

    scenes, calibrate = (
        given if given is not None else number if args.model == DEMO else 0
        for given, number in ((args.scenes, SCENES), (args.calibrate, CALIBRATION))
    )
    with byte_bar(args, f"loading {args.model}") as progress:
        pipeline = from_pretrained(args.model, dtype=args.dtype, progress=progress)
    recipes = tuple(dict.fromkeys(args.recipe or ("int8", "int4")))
    with status(args, "measuring"):
        found = report(pipeline, recipes, scenes=scenes, prompts=args.prompts, calibrate=calibrate)
    print(json.dumps(found.to_dict()) if args.json else "\n".join(_lines(args.model, found)))
    return 0


def _lines(model: str, found: "QuantizationReport") -> Iterator[str]:
    from paligemma_jax.demo.quantization_report import BEFORE, GOALS

    forms = found.forms
    recipes = [name for name in forms if name != BEFORE]
    yield f"{model}: weights of {found.dtype} before, activations of {found.dtype}"
    yield ""
    yield _line("", [found.dtype if name == BEFORE else name for name in forms])
    yield _line("weights", [data_size(form.nbytes) for form in forms.values()])
    yield _line("  language model", [data_size(form.text_nbytes) for form in forms.values()])
    yield _line("tokens/s", [f"{form.tokens_per_second:.1f}" for form in forms.values()])
    close = [forms[name].agreement for name in recipes]
    yield _line("KL", ["", *[f"{a.divergence:.5f}" for a in close if a]])
    yield _line("same token", ["", *[f"{100 * a.same_token:.2f} %" for a in close if a]])
    if not found.scenes:
        return
    yield ""
    for score in forms[BEFORE].scores:
        yield _line(score, [f"{100 * form.scores[score]:.1f} %" for form in forms.values()])
    worst = [max(found.losses(name).values()) for name in recipes]
    yield _line("largest loss, points", ["", *[f"{loss:.1f}" for loss in worst]])
    yield _line("  may be", ["", *[f"{GOALS[name]:.1f}" for name in recipes]])
    yield _line(
        "  reached",
        ["", *["yes" if x <= GOALS[n] else "no" for n, x in zip(recipes, worst, strict=True)]],
    )


def _line(title: str, cells: Sequence[str]) -> str:
    return f"{title:26}" + "".join(f"{cell:>14}" for cell in cells)
