"""`paligemma bench`: how fast this library is here, beside baselines and the machine's roofline."""

import argparse
import math
from pathlib import Path
from typing import Any

from paligemma_jax.benchmark import SIZES, Implementation, Precision, Task
from paligemma_jax.cli import options
from paligemma_jax.cli.output import progress_bar
from paligemma_jax.errors import ConfigError

_EPILOG = """\
Examples:
  paligemma bench                             on CPUs, about fourteen minutes
  paligemma bench --quick                     the most important cases, once
  paligemma bench --size gpu --minutes 9 --markdown   what time allows of a GPU's tables
  paligemma bench --task full --task lora     training, of all weights and of adapters
  paligemma bench --model paligemma2-3b-pt-224 --dtype bfloat16 --repeats 1
  paligemma bench --markdown >> benchmarks.md

Weights are random. Every implementation runs in processes of its own, in turn, and outputs are
compared first: where they differ, no speed counts. "of roofline" is the fraction of the speed that
this machine allows, by the memory bandwidth and the matmuls measured in the same run. Close other
programs: samples during which others take CPU time are filtered out.

Baselines are Hugging Face's implementation, eager and compiled, which comes with
pip install "paligemma-jax[parity]", and big_vision's way of decoding: a scanned model, one call per
token. Training is compared with transformers and PEFT as their Trainer steps them, once the losses
of the first steps are the same; "of roofline" is then the fraction of this machine's matmuls (MFU).

Targets that were not run are not passed.
"""


def add_bench(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "bench",
        run_bench,
        "measure speed and memory on this machine",
        "Measures image encoding, time to first token (TTFT), decode latency, starts, memory, "
        "compilations and training of this library, beside Hugging Face's implementation and the "
        "roofline of the machine, and says which targets are reached.",
        _EPILOG,
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="cpu", help="what is measured (default: %(default)s)")
    add("--quick", action="store_true", help="one repeat of the most important cases")
    add(
        "--task", action="append", choices=list(Task),
        help="inference, training of all weights or of LoRA adapters; may be repeated (default: "
        "inference, and with --size gpu some training)",
    )  # fmt: skip
    add(
        "--model", action="append", metavar="NAME",
        help="instead of the size's own: 4-layer-proxy, 2-layer-proxy, tiny, or a published name; "
        "may be repeated",
    )  # fmt: skip
    add(
        "--implementation", action="append", choices=list(Implementation), metavar="NAME",
        help=f"only this one of {', '.join(Implementation)}; may be repeated",
    )  # fmt: skip
    add("--dtype", action="append", choices=list(Precision), help="only this one; may be repeated")
    add(
        "--repeats", type=options.at_least(1), metavar="N",
        help="processes of each implementation (default: 3, on a GPU 1)",
    )  # fmt: skip
    add(
        "--minutes", type=options.at_least(1), metavar="N",
        help="stop then; what was measured is shown (default: until all is done)",
    )  # fmt: skip
    add("--weights", metavar="DIR", help="keep the random checkpoints here for the next time")
    add(
        "--json", metavar="FILE",
        help="write everything that was measured here, again after every process",
    )  # fmt: skip
    add("--force", action="store_true", help="write over a FILE that exists")
    add("--markdown", action="store_true", help="print tables of Markdown")


def run_bench(args: argparse.Namespace) -> int:
    """`paligemma bench`; returns the exit code."""
    if args.json is not None:
        _check_target(Path(args.json), args.force)
    from paligemma_jax.benchmark.bench import bench

    with progress_bar(args, "case") as progress:
        result = bench(
            args.size,
            tasks=args.task,
            models=args.model,
            implementations=args.implementation,
            dtypes=args.dtype,
            repeats=args.repeats,
            quick=args.quick,
            minutes=args.minutes or math.inf,
            json=args.json,
            weights=args.weights,
            progress=progress,
        )
    print(result.to_markdown() if args.markdown else result)
    return 0


def _check_target(path: Path, force: bool) -> None:
    """Before minutes have passed."""
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; pass --force to replace it")
    if not path.parent.is_dir():
        raise ConfigError(f'there is no directory {path.parent}; run: mkdir -p "{path.parent}"')
