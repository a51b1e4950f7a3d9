"""`paligemma quantize`: rounds a model's weights, and tells what that saves and costs."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.convert import describe_target
from paligemma_jax.cli.progress import byte_bar, count_bar, status
from paligemma_jax.cli.sizes import data_size

if TYPE_CHECKING:
    from paligemma_jax.demo.quantization_report import QuantizationReport
    from paligemma_jax.pipeline import Pipeline

SCENES, PROMPTS, CALIBRATION = 500, 200, 400
RECORDS = 256  # as `paligemma_jax.calibrate`

_EPILOG = """\
Examples:
  paligemma quantize paligemma2-3b-mix-448 small --recipe int8      store it in 8 bits
  paligemma quantize paligemma2-3b-mix-448 small --calibrate train.jsonl
  paligemma quantize demo --report                    the demo model in 8 and in 4 bits
  paligemma quantize demo --report --recipe int4 --scenes 100
  paligemma quantize paligemma2-3b-mix-448 --report   without scores, which are the demo's

TARGET is a store that every command opens as --model TARGET. Without --calibrate it is what convert
--quantize writes: layers pass one by one. With it, weights of 4 bits are rounded by what the model
multiplies them with when it reads some prompts and answers (GPTQ), and lose about half as much: the
model is in memory for that, and up to 4 GB beside it.

For --report the model answers prompts about drawn scenes; then it and the rounded model read those
answers. "KL" is how far the distribution of the next token moves (Kullback-Leibler divergence, nats
a token), "same token" how often the likeliest one stays. "calibr." is calibrated on other scenes.
Scores are those of the demo benchmark: python -m paligemma_jax.demo.evaluate. Tokens a second are
those of one answer, while this ran.
"""


def add(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "quantize",
        run,
        "store weights of 8 or 4 bits, measure what they change",
        "Writes a model with its weights rounded, or compares it with itself after that: memory, "
        "speed, what it would say next, and how well it does.",
        _EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="demo, or a checkpoint of any format")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="what to write; must not exist")
    parser.add_argument(
        "--report", action="store_true", help="measure and print; nothing is written"
    )
    parser.add_argument(
        "--recipe", action="append", type=options.recipe, metavar="RECIPE",
        help=f"{options.SOME_RECIPES}; of --report there may be several (default: int4; --report: "
        "int8 and int4)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=options.DTYPES,
        help="of the weights before, and of what stays floats (default: bfloat16; without "
        "--calibrate and --report as they are stored)",
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
        "--calibration-prompts", type=options.count(100_000), metavar="N",
        help="of the report, about other scenes; 4 bits are measured calibrated on them, too "
        f"(default: {CALIBRATION} for demo, else 0: not)",
    )  # fmt: skip
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibrate", metavar="DATA",
        help="a .jsonl file or a folder as train takes it: prompts with answers about pictures, of "
        "the kind that will be asked",
    )  # fmt: skip
    calibration.add_argument(
        "--records", type=options.positive(1_000_000), default=RECORDS, metavar="N",
        help="of DATA to read (default: %(default)s)",
    )  # fmt: skip
    options.add_batch_size(parser, "records of --calibrate")
    parser.add_argument("--verify", action="store_true", help="read TARGET again, and compare it")
    options.add_json(parser, "one JSON document")


def run(args: argparse.Namespace) -> int:
    """`paligemma quantize`; returns the exit code."""
    if args.report == (args.target is not None):
        args.usage_error("Give either TARGET, to write a model of few bits, or --report.")
    if args.report:
        if args.calibrate is not None:
            args.usage_error("--calibrate is for TARGET; --report has --calibration-prompts.")
        return _report(args)
    if len(args.recipe or ()) > 1:
        args.usage_error("--recipe comes once with TARGET.")
    recipe = (args.recipe or ["int4"])[0]
    if args.calibrate is None:
        _write(args, recipe)
    else:
        _write_calibrated(args, recipe)
    print(f"{args.target}: {describe_target(args.target)}")
    return 0


def _write(args: argparse.Namespace, recipe: str) -> None:
    from paligemma_jax.resolve import find_checkpoint
    from paligemma_jax.weights.convert import convert

    source = find_checkpoint(args.model)
    with byte_bar(args, "rounding") as progress:
        convert(
            source,
            args.target,
            dtype=args.dtype,
            quantize=recipe,
            verify=args.verify,
            progress=progress,
        )


def _write_calibrated(args: argparse.Namespace, recipe: str) -> None:
    from paligemma_jax.calibrate import calibrate
    from paligemma_jax.weights.staging import refuse_existing

    refuse_existing(Path(args.target).expanduser())  # before all the work
    pipeline = _load(args)
    with count_bar(args, "record") as records:
        pipeline = calibrate(
            pipeline,
            args.calibrate,
            recipe,
            records=args.records,
            batch_size=args.batch_size,
            progress=records,
        )
    with byte_bar(args, "writing") as progress:
        origin = {"kind": "quantized", "base": args.model, "calibrated": Path(args.calibrate).name}
        pipeline.save(args.target, verify=args.verify, origin=origin, progress=progress)


def _load(args: argparse.Namespace) -> "Pipeline":
    from paligemma_jax.pretrained import from_pretrained

    with byte_bar(args, f"loading {args.model}") as progress:
        return from_pretrained(args.model, dtype=args.dtype or "bfloat16", progress=progress)


def _report(args: argparse.Namespace) -> int:
    from paligemma_jax.demo.quantization_report import report
    from paligemma_jax.resolve import DEMO

    scenes, calibrate = (
        given if given is not None else number if args.model == DEMO else 0
        for given, number in ((args.scenes, SCENES), (args.calibration_prompts, CALIBRATION))
    )
    pipeline = _load(args)
    recipes = tuple(dict.fromkeys(args.recipe or ("int8", "int4")))
    with status(args, "measuring"):
        found = report(pipeline, recipes, scenes=scenes, prompts=args.prompts, calibrate=calibrate)
    print(json.dumps(found.to_dict()) if args.json else "\n".join(_lines(args.model, found)))
    return 0


def _lines(model: str, found: "QuantizationReport") -> Iterator[str]:
    from paligemma_jax.demo.quantization_report import BEFORE, goal

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
    yield _line("  may be", ["", *[f"{goal(name):.1f}" for name in recipes]])
    yield _line(
        "  reached",
        ["", *["yes" if x <= goal(n) else "no" for n, x in zip(recipes, worst, strict=True)]],
    )


def _line(title: str, cells: Sequence[str]) -> str:
    return f"{title:26}" + "".join(f"{cell:>14}" for cell in cells)
