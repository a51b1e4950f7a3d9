"""Measures the demo model on held-out scenes: `python -m paligemma_jax.demo.evaluate`.

The figures of `paligemma eval --task demo`, in a table and nothing else. Scenes come from a seed
that no training run can reach. Every answer is generated greedily through the public pipeline from
a 224-pixel picture, and compared with the truth exactly.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

from paligemma_jax.evaluation.benchmarks.demo import (
    BATCH_SIZE,
    DEMO,
    SCENES,
    SEED,
    demo_examples,
    demo_table,
)
from paligemma_jax.evaluation.benchmarks.evaluate import evaluate as run
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.pretrained import from_pretrained


@dataclasses.dataclass(frozen=True)
class Result:
    """Share right (or mean average precision), and over how many prompts."""

    value: float
    prompts: int


def evaluate(pipeline: Pipeline, seed: int, count: int) -> dict[str, Result]:
    """Every figure of the model card, over `count` held-out scenes and as many pairs."""
    done = run(pipeline, DEMO, demo_examples(count, seed), batch_size=BATCH_SIZE, resamples=1)
    return {
        name: Result(figure.value, int(done.counts[f"num/{name}"]))
        for name, figure in done.figures.items()
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="checkpoint to measure")
    parser.add_argument("--dtype", default="float32", help="bfloat16 or float32")
    parser.add_argument("--seed", type=int, default=SEED, help="held-out seed")
    parser.add_argument("--count", type=int, default=SCENES, help="scenes")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    began = time.monotonic()
    results = evaluate(from_pretrained(args.model, dtype=args.dtype), args.seed, args.count)
    values = {name: result.value for name, result in results.items()}
    print(demo_table(values, {name: result.prompts for name, result in results.items()}))
    print(
        f"\n{args.count} scenes of seed {args.seed}, {args.dtype}, {time.monotonic() - began:.0f} s"
    )
    if args.json:
        figures = {name: dataclasses.asdict(result) for name, result in results.items()}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
