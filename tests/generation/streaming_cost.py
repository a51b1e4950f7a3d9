"""Measures what a piece of streamed text costs, by the number of tokens between two pieces.

    python -m tests.generation.streaming_cost [--rows 1]

The demo model in float32 answers "caption en" until 64 tokens, its end not allowed before. Seconds
are the fewest of several runs after compiling. `gap` is the longest time between two pieces.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import paligemma_jax as pg
from paligemma_jax.generation.decode import generate
from paligemma_jax.generation.streaming import stream_rows

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
TOKENS = 64
CHUNKS = [1, 2, 4, 8, 16, 32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    pali = pg.from_pretrained(DEMO, dtype="float32")
    model, tokenizer = pali.model, pali.processor.tokenizer
    picture = np.random.default_rng(0).integers(0, 256, (112, 112, 3)).astype(np.uint8)
    batch = pali.processor([picture] * options.rows, ["caption en"] * options.rows)
    settings: dict[str, Any] = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS)

    def streamed(chunk: int) -> tuple[float, float, float]:
        times = [time.perf_counter()]
        for _ in stream_rows(model, tokenizer, batch, **settings, chunk=chunk):
            times.append(time.perf_counter())
        return times[-1] - times[0], times[1] - times[0], max(np.diff(times[1:]))

    def whole() -> float:
        start = time.perf_counter()
        generate(model, batch, **settings)
        return time.perf_counter() - start

    runs = {chunk: [streamed(chunk)] for chunk in CHUNKS}  # compiles
    wholes = [whole()]
    for _ in range(options.repeats):  # in turn: other programs disturb all alike
        wholes.append(whole())
        for chunk in CHUNKS:
            runs[chunk].append(streamed(chunk))
    least = min(wholes[1:])
    print(f"rows {options.rows}: generate {1e3 * least:.1f} ms for {TOKENS} tokens")
    for chunk, measured in runs.items():
        total, first, gap = (1e3 * min(column) for column in zip(*measured[1:], strict=True))
        print(
            f"chunk {chunk:2}: total {total:6.1f} ms ({total / least / 1e3 - 1:+.0%}), "
            f"first piece {first:5.1f} ms, gap {gap:5.2f} ms"
        )


if __name__ == "__main__":
    main()
