"""Measures what a grammar and token statistics add to a decode step, beside decoding without.

    python -m tests.generation.measure_grammar [demo|full] [work]

`full` is Gemma 2B's width and vocabulary with two of its eighteen layers (3 GB in float32). With
`work` it counts processor time, which other programs disturb less.
"""

import dataclasses
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paligemma_jax as pg
from paligemma_jax.config import GemmaConfig
from paligemma_jax.generation.decode import DecodePlan, decode, prefill
from paligemma_jax.generation.detection_grammar import ObjectGrammar, detection_grammar
from paligemma_jax.models.paligemma import PaliGemma, abstract_params, from_params
from tests.generation.decoding import tokenizer
from tests.tiny import tiny_config

PROMPT = 16  # tokens
FULL = GemmaConfig(
    width=2048,
    depth=2,
    mlp_dim=16384,
    num_heads=8,
    num_kv_heads=1,
    head_dim=256,
    query_scale=256**-0.5,
    vocab_size=257152,
)
LABELS = {
    "1 label": ["circle"],
    "80 labels": [f"{a}{b}ing" for a in "abcdefgh" for b in "aeioupqrst"],
}


def full_width() -> PaliGemma:
    """Random bfloat16 numbers as float32 weights."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32)
        values *= 0.02
        return jnp.asarray(values).astype(jnp.bfloat16).astype(jnp.float32)

    config = tiny_config(FULL)
    params = jax.tree.map(draw, abstract_params(config, jnp.float32))
    return from_params(config, params, jnp.float32)


def moved(grammar: ObjectGrammar, model: PaliGemma) -> ObjectGrammar:
    """With the locations where a model of another vocabulary has them: behind all its words."""
    end = model.config.llm.vocab_size
    return dataclasses.replace(grammar, loc_start=end - 1152, seg_start=end - 128)


def added_cost(
    model: PaliGemma, batch: int, what: dict[str, Any], steps: int, repeats: int, clock: Any
) -> tuple[list[float], list[float]]:
    """Seconds a step of `batch` sequences that never end, without and with `what`, in turn.

    The prompt is short and without images: a step is as cheap as it gets, so that the share of
    what is added is rather stated too high.
    """
    size = model.config.img.image_size
    ids = jnp.ones((batch, PROMPT), jnp.int32)
    images = jnp.zeros((batch, 0, size, size, 3))
    logits, filled = prefill(model, images, ids, ids * 0, ids > 0, slots=PROMPT + steps)

    def run(plan: DecodePlan) -> float:
        cache = jax.block_until_ready(jax.tree.map(jnp.copy, filled))  # decode takes it over
        before = clock()
        state = decode(model, plan, cache, logits, jnp.ones(batch, bool), steps)
        jax.block_until_ready(state.progress)
        return (clock() - before) / steps

    plain = DecodePlan.greedy(batch, steps, eos_token_id=None)
    plans = (plain, dataclasses.replace(plain, **what))
    for plan in plans:
        run(plan)  # compiles
    times = [[run(plan) for plan in plans] for _ in range(repeats)]
    without, added = zip(*times, strict=True)
    return list(without), list(added)


def main(which: str, clock: str = "") -> None:
    full = which == "full"
    model = full_width() if full else pg.from_pretrained("demo", dtype="float32").model
    how = dict(steps=8, repeats=5) if full else dict(steps=64, repeats=25)
    loc_start = model.config.llm.vocab_size - 1152
    cases: dict[str, Any] = {
        name: dict(constraint=moved(detection_grammar(tokenizer(), labels), model))
        for name, labels in LABELS.items()
    }
    cases["statistics"] = dict(token_statistics=pg.LocationStatistics(loc_start))
    for batch in (1, 8):
        for name, what in cases.items():
            timer = time.process_time if clock == "work" else time.perf_counter
            plain, added = added_cost(model, batch, what, **how, clock=timer)
            fastest = min(added) / min(plain) - 1
            medians = statistics.median(added) / statistics.median(plain) - 1
            print(
                f"{which} batch {batch} {name:10}: {1e3 * min(plain):8.3f} ms a step, added "
                f"{fastest:+.1%} (fastest), {medians:+.1%} (medians)",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:] or ["demo"])
