"""All that is to be found out on a GPU, in one command and under ten minutes.

    python -m tests.gpu.on_gpu FOLDER

First the questions of `gpu_probe`, in a process of their own, then `paligemma bench --size gpu`
for the rest of the time. What is known is in FOLDER at any time, should the machine go away.
"""

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from paligemma_jax.benchmark.bench import bench, find_accelerator
from paligemma_jax.errors import ConfigError
from tests.gpu import gpu_probe

FILES = ("answers.json", "answers.md", "bench.json", "bench.md")
MINUTES = 9.5
ASKING = 100.0  # seconds for the questions
SLACK = 60.0  # more of them before the process is ended: a question compiles


def measure_all(
    folder: Path, *, minutes: float, size: str = "gpu", questions: Sequence[str] = ()
) -> None:
    """Writes answers.json, answers.md, bench.json and bench.md; `questions` are more arguments.

    Raises ConfigError for the size "gpu" without one, and where one of these files exists.
    """
    began = time.monotonic()
    if size == "gpu" and find_accelerator() is None:
        raise ConfigError(
            "expected a GPU that JAX can use, got none. On CPUs run: paligemma bench --size cpu"
        )
    there = [name for name in FILES if (folder / name).exists()]
    if there:
        raise ConfigError(f"{folder} has {there[0]} of an earlier run. Name another directory")
    folder.mkdir(parents=True, exist_ok=True)
    _ask(folder, questions)
    left = minutes - (time.monotonic() - began) / 60
    result = bench(size, minutes=left, json=folder / "bench.json", progress=_say)
    (folder / "bench.md").write_text(result.to_markdown() + "\n")


def _ask(folder: Path, arguments: Sequence[str]) -> None:
    """The questions; what goes wrong with them does not stop the rest."""
    command = [sys.executable, "-m", gpu_probe.__name__, "--seconds", str(ASKING)]
    command += ["--json", str(folder / "answers.json"), *arguments]
    path = folder / "answers.md"
    with path.open("w") as said, contextlib.suppress(subprocess.TimeoutExpired):
        # Each answer is said there as soon as it is known.
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=said, timeout=ASKING + SLACK)
    answered = [line for line in path.read_text().splitlines() if line.startswith("|")]
    if answered:
        path.write_text("\n".join([*gpu_probe.HEAD, *answered]) + "\n")
    print(path.read_text(), file=sys.stderr, flush=True)


def _say(what: str, done: int, total: int) -> None:
    print(f"{done}/{total} {what}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all (default: 9.5)")
    options = parser.parse_args(arguments)
    try:
        measure_all(options.folder, minutes=options.minutes)
    except ConfigError as e:
        parser.exit(1, f"{e}\n")
    print((options.folder / "answers.md").read_text())
    print((options.folder / "bench.md").read_text())


if __name__ == "__main__":
    main()
