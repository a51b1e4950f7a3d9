"""All that is to be found out on a GPU, in one command and under ten minutes.

    python -m paligemma_jax.benchmark.on_gpu FOLDER

First the questions of `gpu_questions`, in a process of their own, then `paligemma bench --size gpu`
for the rest of the time. What is known is in FOLDER at any time, should the machine go away.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from paligemma_jax.benchmark import gpu_questions
from paligemma_jax.benchmark.bench import bench
from paligemma_jax.benchmark.environment import find_accelerator
from paligemma_jax.errors import ConfigError

MINUTES = 9.5
ASKING = 100.0  # seconds for the questions
SLACK = 60.0  # more of them before the process is ended: a question compiles


def measure_all(
    folder: Path, *, minutes: float, size: str = "gpu", questions: Sequence[str] = ()
) -> None:
    """Writes answers.json, answers.md, bench.json and bench.md; `questions` are more arguments.

    Raises ConfigError for the size "gpu" without one.
    """
    began = time.monotonic()
    if size == "gpu" and find_accelerator() is None:
        raise ConfigError(
            "There is no GPU that JAX can use here. What CPUs can tell: paligemma bench --size cpu"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _ask(folder, questions)
    left = minutes - (time.monotonic() - began) / 60
    result = bench(size, minutes=left, json=folder / "bench.json", progress=_say)
    (folder / "bench.md").write_text(result.to_markdown() + "\n")


def _ask(folder: Path, arguments: Sequence[str]) -> None:
    """The questions; what goes wrong with them does not stop the rest."""
    answers = folder / "answers.json"
    command = [sys.executable, "-m", gpu_questions.__name__]
    command += ["--seconds", str(ASKING), "--json", str(answers), *arguments]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ASKING + SLACK)
        lines, failed = asked.stdout.splitlines(), asked.stderr if asked.returncode else ""
    except subprocess.TimeoutExpired as e:
        lines, failed = [], f"no end after {e.timeout:g} seconds"
    table = "\n".join(line for line in lines if line.startswith("|"))
    (folder / "answers.md").write_text(f"{table or failed[-2000:]}\n")
    print(table or failed, file=sys.stderr, flush=True)


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
