"""`paligemma train`: fine-tuning by a configuration file."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from paligemma_jax.cli import options
from paligemma_jax.cli.progress import wanted

_PREFIX = "--config."
_INTERRUPTED = 130

_EPILOG = """\
Examples:
  paligemma train --config configs/jsonl.py:data=my_dataset --workdir runs/mine
  paligemma train --config configs/lora_24gb.py:data=my_dataset --workdir runs/lora
  paligemma train --config configs/transfers/cococap.py:resolution=448 --workdir runs/cococap
  paligemma train --config configs/jsonl.py --workdir runs/mine \\
      --config.learning_rate=3e-5 --config.duration='Epochs(3)' --config.lora='LoRA(rank=16)'
  paligemma caption photo.jpg --model runs/mine/model

Settings are those of configs/base.py, which explains each. A name that does not exist is an error.

The same command goes on where it was stopped or killed, with the same losses as if it had not been.
SIGTERM and Ctrl-C save first (exit codes 0 and 130). WORKDIR then holds metrics.jsonl, report.html,
checkpoints/ and, at the end, model/, which every other command takes as --model.
"""


def add(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "train",
        run,
        "fine-tune on pictures with prompts and answers",
        "Fine-tunes a model by a configuration file, whole or in parts, or adapters (LoRA) beside "
        "it; goes on by itself after an interruption.",
        _EPILOG,
    )
    parser.add_argument(
        "--config", metavar="FILE[:ARGS]", help="configuration, such as configs/jsonl.py:size=10b"
    )
    parser.add_argument("--workdir", metavar="DIR", help="where everything is written")
    parser.add_argument(
        f"{_PREFIX}NAME",
        dest="settings",
        action="append",
        default=[],
        metavar="VALUE",
        help="change a setting, for example --config.batch_size=16; may be repeated",
    )
    parser.add_argument(
        "--changed",
        action="store_true",
        help="go on although settings have changed that decide what is learned",
    )


def take_settings(argv: Sequence[str]) -> list[str]:
    """`argv` with every --config.x=y, or --config.x y, as the option that the parser knows."""
    given, taken = list(argv), []
    while given:
        word = given.pop(0)
        if word.startswith(_PREFIX):
            name, equals, value = word.removeprefix(_PREFIX).partition("=")
            if not equals and given and not given[0].startswith("--"):
                equals, value = "=", given.pop(0)
            word = f"{_PREFIX}NAME={name}{equals}{value}"
        taken.append(word)
    return taken


def run(args: argparse.Namespace) -> int:
    """`paligemma train`; returns the exit code."""
    if args.config is None or args.workdir is None:
        args.usage_error("the following arguments are required: --config, --workdir")
    from paligemma_jax.training.config import TrainConfig
    from paligemma_jax.training.config_file import load_config
    from paligemma_jax.training.loop import train

    config = TrainConfig.from_config(load_config(args.config, args.settings))
    with _shown(args) as progress:
        result = train(config, args.workdir, progress=progress, changed=args.changed)
    if not result.finished:
        print(f"{args.workdir}: saved at step {result.step:,}; the same command goes on")
        return _INTERRUPTED if result.stopped_by == "SIGINT" else 0
    print(f"{result.model}: the trained model; a report is in {args.workdir}/report.html")
    if result.adapter is not None:
        print(f"{result.adapter}: the adapters alone, as PEFT reads them")
    return 0


@contextlib.contextmanager
def _shown(args: argparse.Namespace) -> Iterator[Callable[[int, int, Mapping[str, float]], None]]:
    """A bar on a terminal; lines elsewhere, whenever there are new numbers."""
    if not wanted(args):
        last: list[object] = [None]

        def tell(step: int, total: int, values: Mapping[str, float]) -> None:
            logged = values.get("samples_per_second")
            if logged != last[0] or step == total:
                last[0] = logged
                print(f"step {step}/{total} {_numbers(values)}", file=sys.stderr, flush=True)

        yield tell
        return
    from tqdm import tqdm

    with tqdm(unit="step", file=sys.stderr, smoothing=0.05) as bar:

        def update(step: int, total: int, values: Mapping[str, float]) -> None:
            if bar.total is None:
                bar.total, bar.initial, bar.n = total, step - 1, step - 1
            bar.set_postfix_str(_numbers(values), refresh=False)
            bar.update(step - bar.n)

        yield update


def _numbers(values: Mapping[str, float]) -> str:
    shown = [f"loss {values['loss']:.4g}"]
    if "validation_loss" in values:
        shown.append(f"validation {values['validation_loss']:.4g}")
    if "samples_per_second" in values:
        shown.append(f"{values['samples_per_second']:.3g} samples/s")
        shown.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        shown.append(f"MFU {values['mfu']:.0%}")
    return ", ".join(shown)
