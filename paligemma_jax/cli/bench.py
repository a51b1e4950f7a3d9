"""`paligemma bench`: how fast this library is here, beside its peers and the machine's limits."""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from paligemma_jax.cli import options
from paligemma_jax.cli.progress import wanted
from paligemma_jax.errors import ConfigError

# As `paligemma_jax.benchmark` has them, which takes long to import.
SIZES = ("cpu", "gpu", "tiny")
IMPLEMENTATIONS = ("ours", "scanned", "huggingface", "huggingface-compiled")
TASKS = ("answer", "full", "lora")
DTYPES = ("float32", "bfloat16", "int8", "int8-dynamic", "int4")
REPEATS, LONGEST = 99, 100_000

_EPILOG = """\
Examples:
  paligemma bench                             on CPUs, about fourteen minutes
  paligemma bench --quick                     the most important cases, once
  paligemma bench --size gpu --minutes 9 --markdown   what time allows of a GPU's tables
  paligemma bench --task full --task lora     training, of all weights and of adapters
  paligemma bench --model paligemma2-3b-pt-224 --dtype bfloat16 --repeats 1
  paligemma bench --markdown >> benchmarks.md

Weights are random. Every implementation runs in processes of its own, in turn, and outputs are
compared first: where they differ, no speed counts. "of floor" is the share of the speed that this
machine allows, by the memory bandwidth and matrix products measured in the same run. Close other
programs: samples during which others take CPU time are left out.

Hugging Face's implementation comes with: pip install "paligemma-jax[parity]"
Training is held against transformers and PEFT as their Trainer steps them, once the losses of the
first steps are the same; "of floor" is then the share of this machine's matrix products (MFU).

"scanned" is how big_vision decodes. Goals that were not run are not passed.
"""


def add(commands: Any) -> None:
    """Adds the parser of this command."""
    parser = options.add_command(
        commands,
        "bench",
        run,
        "measure speed and memory on this machine",
        "Measures image encoding, time to the first token, decoding, starts, memory, "
        "compilations and training of this library, beside Hugging Face's implementation and the "
        "limits of the machine, and says which goals are reached.",
        _EPILOG,
    )
    parser.add_argument(
        "--size", choices=SIZES, default="cpu", help="what is measured (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one repeat of the most important cases"
    )
    parser.add_argument(
        "--task", action="append", choices=TASKS,
        help="prompts, training of all weights or of adapters; may be repeated (default: answer, "
        "and with --size gpu some training)",
    )  # fmt: skip
    parser.add_argument(
        "--model", action="append", metavar="NAME",
        help="instead of the size's own: mid, small, tiny, or a published name; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--implementation", action="append", choices=IMPLEMENTATIONS,
        help="only this one; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="only this one; may be repeated"
    )
    parser.add_argument(
        "--repeats", type=options.positive(REPEATS), metavar="N",
        help="processes of each implementation (default: 3, on a GPU 1)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=options.positive(LONGEST), metavar="N",
        help="stop then; what was measured is shown (default: until all is done)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", metavar="DIR", help="keep the random checkpoints here for the next time"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write everything that was measured here, again after every process",
    )
    parser.add_argument("--force", action="store_true", help="write over a FILE that exists")
    parser.add_argument("--markdown", action="store_true", help="print tables of Markdown")


def run(args: argparse.Namespace) -> int:
    """`paligemma bench`; returns the exit code."""
    target = None if args.json is None else _target(args)
    from paligemma_jax.benchmark.bench import bench

    with _line(args) as progress:
        result = bench(
            args.size,
            tasks=args.task,
            models=args.model,
            implementations=args.implementation,
            dtypes=args.dtype,
            repeats=args.repeats,
            quick=args.quick,
            minutes=args.minutes or math.inf,
            json=target,
            weights=args.weights,
            progress=progress,
        )
    print(result.to_markdown() if args.markdown else result)
    return 0


def _target(args: argparse.Namespace) -> Path:
    """Where to write, found out before minutes have passed."""
    path = Path(args.json)
    if path.exists() and not args.force:
        raise ConfigError(f"{path} exists already. Another name fits, or: --force")
    if not path.parent.is_dir():
        raise ConfigError(f"There is no directory {path.parent}. Run: mkdir -p {path.parent}")
    return path


@contextlib.contextmanager
def _line(args: argparse.Namespace) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error that says what is being measured."""
    if not wanted(args):
        yield lambda what, done, total: None
        return
    from tqdm import tqdm

    with tqdm(unit="case", file=sys.stderr) as bar:

        def update(what: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description_str(what, refresh=False)
            bar.update(done - bar.n)
            bar.refresh()

        yield update
