"""train: fine-tuning by a configuration file."""

import argparse
import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paligemma_jax.cli import options
from paligemma_jax.cli.output import progress_bar, wants_progress
from paligemma_jax.errors import ConfigError

_PREFIX = "--config."
_INTERRUPTED = 130
_TIMEOUT, _DELAY = 300, 10  # seconds

_EPILOG = """\
Examples:
  paligemma train --check-data my_dataset                problems of the data
  paligemma train --check-data --config my_config.py     the same of what the file trains on
  paligemma train --config jsonl:data=my_dataset --workdir runs/mine
  paligemma train --config lora_24gb:data=my_dataset --workdir runs/lora
  paligemma train --config transfers:task=cococap,resolution=448 --workdir runs/cococap
  paligemma train --config jsonl --workdir runs/mine \\
      --config.learning_rate=3e-5 --config.duration='Epochs(3)' --config.lora='LoRA(rank=16)'
  paligemma caption photo.jpg --model runs/mine/model

Settings are those of configs/base.py, which explains each. A name that does not exist is an error.

The same command resumes where it was stopped or killed, with the same losses as without the break.
SIGTERM and Ctrl-C save first (exit codes 0 and 130). WORKDIR then holds metrics.jsonl, report.html,
checkpoints/ and, at the end, model/, which every other command takes as --model.
"""


def add_train(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands, "train", run_train, "fine-tune on images with prompts and answers",
        "Fine-tunes a model by a configuration file: all weights, some of them, or adapters "
        "(LoRA); resumes by itself after an interruption.", _EPILOG,
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="NAME[:ARGS]",
        help="configuration: a name such as jsonl:size=10b, or a Python file",
    )  # fmt: skip
    parser.add_argument("--workdir", metavar="DIR", help="where everything is written")
    parser.add_argument(
        f"{_PREFIX}NAME", dest="settings", action="append", default=[], metavar="VALUE",
        help="change a setting, for example --config.batch_size=16; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--check-data", nargs="?", const="", metavar="DATA",
        help="check data instead of training: its problems, how long texts are, and an image of "
        "samples (WORKDIR/data_check.png); with --config as that would use it, and without DATA "
        "what that trains on, each component of a mixture",
    )  # fmt: skip
    parser.add_argument(
        "--estimate-memory", action="store_true",
        help="print how much memory a training step takes, and stop",
    )  # fmt: skip
    parser.add_argument(
        "--distributed", nargs="?", const="", metavar="HOST:PORT,I,N",
        help="be one of several processes: the coordinator's address, the index of this process "
        "from 0, and their number; without a value as SLURM, TPU pods and GKE say it",
    )  # fmt: skip
    parser.add_argument(
        "--allow-config-change", action="store_true",
        help="resume although settings have changed that decide what is learned",
    )  # fmt: skip


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


def run_train(args: argparse.Namespace) -> int:
    """`paligemma train`; returns the exit code."""
    if args.check_data is not None:
        if not args.check_data and args.config is None:
            args.usage_error("--check-data needs DATA, or --config that says what is trained on")
        return _check_data(args)
    if args.config is None or (args.workdir is None and not args.estimate_memory):
        args.usage_error("the following arguments are required: --config, --workdir")
    if args.distributed is not None:
        _join(args.distributed)
    from paligemma_jax.training.config import TrainConfig, load_config
    from paligemma_jax.training.distributed import is_first
    from paligemma_jax.training.logging import progress_display
    from paligemma_jax.training.memory_plan import describe_memory, device_memory
    from paligemma_jax.training.trainer import train

    config = TrainConfig.from_config(load_config(str(args.config), args.settings))
    if args.estimate_memory:
        print(describe_memory(config, device_memory()))
        return 0
    if is_first() and (memory := describe_memory(config, device_memory(), brief=True)):
        print(memory, file=sys.stderr)
    with progress_display(bar=wants_progress(args)) as progress:
        result = train(
            config,
            str(args.workdir),
            progress=progress if is_first() else None,
            allow_config_change=args.allow_config_change,
        )
    if is_first() and result.finished:
        print(f"{result.model}: the trained model; a report is in {result.workdir}/report.html")
        if result.adapter is not None:
            print(f"{result.adapter}: the adapters alone, as PEFT reads them")
    elif is_first():
        print(f"{args.workdir}: saved at step {result.step:,}; the same command resumes")
    return _INTERRUPTED if result.stopped_by == "SIGINT" and not result.finished else 0


def _check_data(args: argparse.Namespace) -> int:
    """Checks data instead of training; 1 if training would stop at it."""
    from paligemma_jax.data.check import check_data
    from paligemma_jax.loading import find_checkpoint, load_processor
    from paligemma_jax.processing.masks import MaskCodec
    from paligemma_jax.training.config import (
        Data,
        TrainConfig,
        load_config,
        open_records,
    )
    from paligemma_jax.weights.checkpoint import open_checkpoint

    data: Any = args.check_data
    processor, length, transforms = None, None, ()
    images = reader = codec = None
    if args.config is not None:
        config = TrainConfig.from_config(load_config(str(args.config), args.settings))
        processor, length = load_processor(config.model), config.text_length
        transforms = config.transforms
        if not args.check_data:
            with open_checkpoint(find_checkpoint(config.model)) as checkpoint:
                vae = checkpoint.mask_codec
            codec = None if vae is None else MaskCodec(vae)
            data = open_records(config.train, "train", codec=codec)
        elif isinstance(config.train, Data):
            images, reader = config.train.images, config.train.reader
    sheet = Path(args.workdir or ".") / "data_check.png"
    with progress_bar(args, "record") as progress:
        report = check_data(
            data,
            processor,
            length,
            images=images,
            reader=reader,
            codec=codec,
            transforms=transforms,
            sheet=sheet,
            progress=progress,
        )
    print(report)
    return 0 if report.ok else 1


def _join(given: str) -> None:
    """Makes this process one of several; without a value JAX finds out which."""
    import jax

    if not given:
        with _waiting("the other processes"):
            jax.distributed.initialize(initialization_timeout=_TIMEOUT)
        return
    address, *numbers = given.split(",")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ConfigError(
            "--distributed: expected the coordinator's address, the index of this process and the "
            f"number of processes, such as 10.0.0.1:1234,0,2, got {given!r}"
        )
    with _waiting(f"all {numbers[1]} processes at {address}"):
        jax.distributed.initialize(
            address, int(numbers[1]), int(numbers[0]), initialization_timeout=_TIMEOUT
        )


@contextlib.contextmanager
def _waiting(whom: str) -> Iterator[None]:
    """Says on standard error what the block waits for, if it takes long."""
    message = f"paligemma: waiting for {whom}, up to {_TIMEOUT} seconds"
    timer = threading.Timer(_DELAY, lambda: print(message, file=sys.stderr, flush=True))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
