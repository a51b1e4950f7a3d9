"""convert and quantize: checkpoints in another format, or with fewer bits."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli import options
from paligemma_jax.cli.output import data_size, progress_bar, status

if TYPE_CHECKING:
    from paligemma_jax.evaluation.quantization_report import QuantizationReport
    from paligemma_jax.pipeline import Pipeline

_CONVERT = """\
Examples:
  paligemma convert paligemma2-3b-mix-448 checkpoint/
  paligemma convert paligemma-3b-pt-224.npz checkpoint/ --tokenizer paligemma_tokenizer.model
  paligemma convert checkpoint/ for_transformers/ --to huggingface --verify
  paligemma convert checkpoint/ model.npz --to big_vision --dtype bfloat16
  paligemma convert paligemma2-3b-pt-224 pt-448/ --resolution 448
  paligemma convert paligemma2-3b-mix-448 small/ --quantize int4
  paligemma convert small/ for_transformers/ --to huggingface --dequantize

  orbax        one directory with everything in it, checksums of all arrays included; loads fastest
  huggingface  sharded safetensors with tokenizer and settings: for transformers, and Roboflow's
               deploy
  big_vision   an npz; a directory of it and the tokenizer where TARGET does not end in .npz

Layers are converted one by one, so memory does not depend on the size of the model. TARGET appears
when all of it is written; an existing one is never replaced. Dtypes stay as they are without
--dtype. --quantize stores what `--model SOURCE --quantize` would compute, which only orbax can.
`paligemma info TARGET --check` verifies the checksums later.
"""
_QUANTIZE = """\
Examples:
  paligemma quantize paligemma2-3b-mix-448 small --quantization int8   store it in 8 bits
  paligemma quantize paligemma2-3b-mix-448 small --calibrate train.jsonl
  paligemma quantize demo --report                       the demo model in 8 and in 4 bits
  paligemma quantize demo --report --quantization int4 --scenes 100
  paligemma quantize paligemma2-3b-mix-448 --report      without scores, which are the demo's

TARGET is a checkpoint that every command takes as --model TARGET. Without --calibrate it is what
convert --quantize writes, layer by layer. With it, 4-bit weights are calibrated on what the model
computes for some prompts with answers (GPTQ), and lose about half as much: the model is in memory
for that, and up to 4 GB more.

For --report the model answers prompts about drawn scenes; then it and the quantized model read
those answers. "KL" is the Kullback-Leibler divergence of the next token's distribution (nats a
token), "top-1 agreement" how often the most probable token stays the same. "calibr." is calibrated
on other scenes. Scores are those of paligemma eval --task demo. Tokens/s are those of batch 1.
"""


def add_convert(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands, "convert", run_convert, "convert a checkpoint to another format",
        "Converts a checkpoint of any format to an Orbax checkpoint, to a Hugging Face directory "
        "for transformers, or to big_vision's npz.", _CONVERT,
    )  # fmt: skip
    parser.add_argument(
        "source", metavar="SOURCE",
        help="demo, published name, Hugging Face directory, big_vision .npz, converted directory",
    )  # fmt: skip
    parser.add_argument("target", metavar="TARGET", help="what to write; must not exist")
    parser.add_argument(
        "--to", choices=("orbax", "huggingface", "big_vision"), default="orbax",
        help="format (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=options.DTYPES, help="cast all floats")
    bits = parser.add_mutually_exclusive_group()
    options.add_quantize(bits, "quantize the weights, and store them so")
    bits.add_argument(
        "--dequantize", action="store_true",
        help="store quantized weights as floats (default dtype: bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--resolution", type=options.at_least(1), metavar="N",
        help="resample the position embeddings to images of N x N pixels",
    )  # fmt: skip
    options.add_tokenizer(parser)
    options.add_mask_codec(parser)
    _add_verify(parser)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify", action="store_true", help="read TARGET again, and compare every tensor"
    )


def run_convert(args: argparse.Namespace) -> int:
    """`paligemma convert`; returns the exit code."""
    names = ("dtype", "resolution", "tokenizer", "mask_codec", "quantize", "dequantize", "verify")
    _convert(args, args.source, format=args.to, **{name: getattr(args, name) for name in names})
    if args.verify:
        print(f"{args.target}: every tensor is as in {args.source}")
    return 0


def _convert(args: argparse.Namespace, source: str, **settings: Any) -> None:
    from paligemma_jax.loading import find_checkpoint
    from paligemma_jax.weights.convert import convert

    path = find_checkpoint(source)
    with progress_bar(args, "B", "converting") as progress:
        convert(path, args.target, progress=progress, **settings)
    _print_target(args.target)


def _print_target(path: str) -> None:
    from paligemma_jax.weights.checkpoint import describe

    target = Path(path).expanduser()
    written = describe(target)
    rest = ""
    if target.is_dir():
        rest = ", tokenizer and mask codec" if written.has_mask_codec else " and tokenizer"
        rest = f", with configuration, preprocessing{rest}"
    dtypes = " and ".join(written.dtypes)
    size = data_size(written.nbytes)
    print(f"{path}: {written.parameters:,} parameters in {dtypes}, {size}{rest}")


def add_quantize(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands, "quantize", run_quantize, "quantize a model, measure what that changes",
        "Stores a model with quantized weights, or compares it with itself after that: memory, "
        "speed, distributions of the next token, and scores.", _QUANTIZE,
        json="one JSON object, for --report",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="demo, or a checkpoint of any format")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="what to write; must not exist")
    parser.add_argument(
        "--quantization", action="append", metavar="FORMAT",
        help=f"{options.QUANTIZATION_FORMATS}; with --report it may be repeated (default: int4; "
        "--report: int8 and int4)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=options.DTYPES,
        help="of the weights before, and of those not quantized (default: bfloat16; without "
        "--calibrate and --report as they are stored)",
    )  # fmt: skip
    _add_verify(parser)
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibrate", metavar="DATA",
        help="a .jsonl file or a folder as train takes it: prompts with answers about images, of "
        "the kind that will be asked",
    )  # fmt: skip
    calibration.add_argument(
        "--calibration-samples", type=options.at_least(1), default=256, metavar="N",
        help="samples of DATA to use (default: %(default)s)",
    )  # fmt: skip
    options.add_batch_size(calibration, "samples of DATA")
    report = parser.add_argument_group("report")
    report.add_argument(
        "--report", action="store_true", help="measure and print; nothing is written"
    )
    report.add_argument(
        "--scenes", type=options.at_least(0), metavar="N",
        help="scenes of the demo evaluation (default: 500 for demo, else 0: no scores)",
    )  # fmt: skip
    report.add_argument(
        "--prompts", type=options.at_least(1), default=200, metavar="N",
        help="prompts whose answers are compared token by token (default: %(default)s)",
    )  # fmt: skip
    report.add_argument(
        "--calibration-prompts", type=options.at_least(0), metavar="N",
        help="prompts about other scenes on which 4 bits are calibrated, too (default: 400 for "
        "demo, else 0: not)",
    )  # fmt: skip


def run_quantize(args: argparse.Namespace) -> int:
    """`paligemma quantize`; returns the exit code."""
    if args.report == (args.target is not None):
        args.usage_error("pass either TARGET, to write a quantized model, or --report")
    if args.report and args.calibrate is not None:
        args.usage_error("--calibrate is for TARGET; with --report pass --calibration-prompts")
    if args.report:
        return _report(args)
    if len(args.quantization or ()) > 1:
        args.usage_error("--quantization comes once with TARGET")
    quantization = (args.quantization or ["int4"])[0]
    if args.calibrate is None:
        _convert(args, args.model, dtype=args.dtype, quantize=quantization, verify=args.verify)
    else:
        _calibrate(args, quantization)
    return 0


def _calibrate(args: argparse.Namespace, quantization: str) -> None:
    from paligemma_jax.filesystem import refuse_existing
    from paligemma_jax.training.calibrate import calibrate

    refuse_existing(Path(args.target).expanduser())  # before all the work
    pipeline = _load(args)
    with progress_bar(args, "sample", "calibrating") as progress:
        pipeline = calibrate(
            pipeline,
            args.calibrate,
            quantization,
            samples=args.calibration_samples,
            batch_size=args.batch_size,
            progress=progress,
        )
    with progress_bar(args, "B", "writing") as progress:
        origin = {"kind": "quantized", "base": args.model, "calibrated": Path(args.calibrate).name}
        pipeline.save(args.target, verify=args.verify, origin=origin, progress=progress)
    _print_target(args.target)


def _load(args: argparse.Namespace) -> "Pipeline":
    from paligemma_jax.loading import from_pretrained

    with progress_bar(args, "B", f"loading {args.model}") as progress:
        return from_pretrained(args.model, dtype=args.dtype or "bfloat16", progress=progress)


def _report(args: argparse.Namespace) -> int:
    from paligemma_jax.evaluation.quantization_report import report
    from paligemma_jax.loading import DEMO

    scenes, calibrate = args.scenes, args.calibration_prompts
    if scenes is None:
        scenes = 500 if args.model == DEMO else 0
    if calibrate is None:
        calibrate = 400 if args.model == DEMO else 0
    pipeline = _load(args)
    formats = tuple(dict.fromkeys(args.quantization or ("int8", "int4")))
    with status(args, "measuring"):
        found = report(pipeline, formats, scenes=scenes, prompts=args.prompts, calibrate=calibrate)
    print(json.dumps(found.to_dict()) if args.json else "\n".join(report_lines(args.model, found)))
    return 0


def report_lines(model: str, found: "QuantizationReport") -> Iterator[str]:
    """The report as a table: a column for the model before, and one for each configuration."""
    from paligemma_jax.evaluation.quantization_report import BEFORE, max_loss

    variants = found.variants
    names = [name for name in variants if name != BEFORE]
    yield f"{model}: weights of {found.dtype} before, activations of {found.dtype}"
    yield ""
    yield _row("", [found.dtype if name == BEFORE else name for name in variants])
    yield _row("weights", [data_size(one.nbytes) for one in variants.values()])
    yield _row("  language model", [data_size(one.text_nbytes) for one in variants.values()])
    yield _row("tokens/s", [f"{one.tokens_per_second:.1f}" for one in variants.values()])
    close = [agreement for name in names if (agreement := variants[name].agreement)]
    yield _row("KL", ["", *[f"{one.divergence:.5f}" for one in close]])
    yield _row("top-1 agreement", ["", *[f"{100 * one.top1_agreement:.2f} %" for one in close]])
    if not found.scenes:
        return
    yield ""
    for score in variants[BEFORE].scores:
        yield _row(score, [f"{100 * one.scores[score]:.1f} %" for one in variants.values()])
    worst = {name: max(found.losses(name).values()) for name in names}
    yield _row("largest loss, points", ["", *[f"{loss:.1f}" for loss in worst.values()]])
    yield _row("  target", ["", *[f"{max_loss(name):.1f}" for name in names]])
    reached = ["yes" if loss <= max_loss(name) else "no" for name, loss in worst.items()]
    yield _row("  reached", ["", *reached])


def _row(title: str, cells: Sequence[str]) -> str:
    return f"{title:26}" + "".join(f"{cell:>14}" for cell in cells)
