"""Every direction of `paligemma convert` at full size: seconds and peak memory of each.

    python -m tests.fullsize.directions HUGGING_FACE_DIRECTORY --folder /somewhere/with/room

Needs room for two copies of the checkpoint. Each conversion runs in a process of its own, so that
its peak memory is its own; the last copy of each format is compared with its source (--verify).
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from tests.fullsize.prove import run_step

# From, to, options; what is not needed any more is removed as soon as it can be.
STEPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("source", "orbax", ()),
    ("orbax", "huggingface", ()),
    ("orbax", "big_vision", ()),
    ("big_vision", "orbax", ("--verify",)),
    ("big_vision", "huggingface", ("--verify",)),
    ("huggingface", "big_vision", ("--verify",)),
)


def convert_all(source: Path, folder: Path) -> list[dict[str, Any]]:
    """What was measured in each step."""
    folder.mkdir(parents=True)
    paths = {"source": source, **{name: folder / name for name in ("orbax", "huggingface")}}
    paths["big_vision"] = folder / "big_vision"
    found: list[dict[str, Any]] = []
    for number, (start, end, options) in enumerate(STEPS):
        shutil.rmtree(paths[end], ignore_errors=True)
        for name, path in paths.items():
            later = {step[0] for step in STEPS[number:]}
            if name != "source" and name not in later and path.exists():
                shutil.rmtree(path)
        command = ["-m", "paligemma_jax", "convert", str(paths[start]), str(paths[end])]
        measured, _ = run_step(*command, "--to", end, *options)
        found.append({"from": start, "to": end, "options": " ".join(options), **measured})
        print(row(found[-1]), flush=True)
    shutil.rmtree(folder)
    return found


def row(found: dict[str, Any]) -> str:
    """Of the table in benchmarks.md."""
    start = "huggingface" if found["from"] == "source" else found["from"]
    peak = found["peak_bytes"] / 1e9
    return f"| {start} | {found['to']} {found['options']} | {found['seconds']} | {peak:.2f} |"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = convert_all(args.source, args.folder)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
