"""Published sizes with random weights: write, convert, load, ask, and compare with transformers.

    python tests/fullsize/prove.py paligemma-3b-pt-224 --folder /somewhere/with/30/GB

Each step runs in a process of its own, so that its peak memory is its own. Prints a Markdown row
for benchmarks.md and, with --json, all figures. Needs the extra "parity" for the comparison.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.config import VARIANTS
from tests.fullsize import steps, synthetic

ROOT = Path(__file__).parents[2]


def run_step(*command: str) -> tuple[dict[str, float], str]:
    """Seconds and peak resident bytes of a child process, and what it printed."""
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    child = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    peak = usage.ru_maxrss * 1024  # Linux counts KiB
    return {"seconds": round(time.monotonic() - began, 1), "peak_bytes": peak}, output


def prove(name: str, folder: Path) -> dict[str, Any]:
    """Runs every step for one published name; files already there are taken as they are."""
    config = VARIANTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    hub, npz = folder / "hub", folder / f"{name}.npz"
    tokenizer = synthetic.make_tokenizer(config.llm.vocab_size)
    if not hub.exists():
        synthetic.write_hugging_face(hub, config, shard_bytes=2_000_000_000)
        (hub / "tokenizer.model").write_bytes(tokenizer)
    if not npz.exists():
        synthetic.write_big_vision(npz, config)
        (folder / "tokenizer.model").write_bytes(tokenizer)
    image = folder / "image.png"
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    Image.fromarray(pixels).save(image)

    found: dict[str, Any] = {"name": name}
    found["weights_bytes"] = sum(f.stat().st_size for f in hub.glob("*.safetensors"))
    for source, kind in ((hub, "huggingface"), (npz, "big_vision")):
        store = folder / f"store-{kind}"
        if not store.exists():
            found[f"convert {kind}"], _ = run_step(
                "-m", "paligemma_jax", "convert", str(source), str(store)
            )
        found[f"load {kind}"], _ = run_step("-m", "tests.fullsize.steps", "load", str(source))
        found[f"load store of {kind}"], _ = run_step(
            "-m", "tests.fullsize.steps", "load", str(store)
        )
        found[f"generate from store of {kind}"], generation = run_step(
            "-m", "paligemma_jax", "generate", str(image), "caption en", "--json",
            "--model", str(store), "--dtype", "bfloat16", "--max-new-tokens", "4",
        )  # fmt: skip
        found[f"generation {kind}"] = json.loads(generation)
    ours, theirs = folder / "ours.npy", folder / "theirs.npy"
    found["ours float32"], _ = run_step("-m", "tests.fullsize.steps", "ours", str(hub), str(ours))
    found["transformers float32"], _ = run_step(
        "-m", "tests.fullsize.steps", "theirs", str(hub), str(theirs)
    )
    found["logits"] = steps.compare(np.load(ours), np.load(theirs))
    return found


def row(found: dict[str, Any]) -> str:
    """The row for benchmarks.md."""
    weights = found["weights_bytes"]
    ratios = [found[key]["peak_bytes"] / weights for key in found if key.startswith("load ")]
    logits = found["logits"]
    return (
        f"| {found['name']} | {weights / 1e9:.2f} | "
        f"{found.get('convert huggingface', {}).get('seconds', '-')} / "
        f"{found.get('convert big_vision', {}).get('seconds', '-')} | "
        f"{found['load store of huggingface']['seconds']} | {max(ratios):.2f} | "
        f"{found['generate from store of huggingface']['seconds']} | "
        f"{logits['max_difference']:.1e} of {logits['scale']:.1f} | "
        f"{logits['top1_agreement']:.0%} |"
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(VARIANTS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = prove(args.name, args.folder)
    print(row(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
