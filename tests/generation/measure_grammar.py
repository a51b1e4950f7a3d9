"""Measures what the grammar costs a token.

    python -m tests.generation.measure_grammar [demo|full] [work]

`full` is Gemma 2B's width and vocabulary with two of its eighteen layers (3 GB in float32). With
`work` it counts processor time, which other programs disturb less.
"""

import dataclasses
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from paligemma_jax.generation.added_cost import added_cost
from tests.generation.speaking import tokenizer

import paligemma_jax as pg
from paligemma_jax.config import GemmaConfig
from paligemma_jax.generation.decode import BoxEvidence
from paligemma_jax.generation.detection_grammar import ObjectGrammar, detection_grammar
from paligemma_jax.models.paligemma import PaliGemma, abstract_params, from_params
from tests.tiny import tiny_config

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
    return from_params(
        config, jax.tree.map(draw, abstract_params(config, jnp.float32)), jnp.float32
    )


def moved(grammar: ObjectGrammar, model: PaliGemma) -> ObjectGrammar:
    """With the locations where a model of another vocabulary has them: behind all its words."""
    end = model.config.llm.vocab_size
    return dataclasses.replace(grammar, loc_start=end - 1152, seg_start=end - 128)


def main(which: str, clock: str = "") -> None:
    model = full_width() if which == "full" else pg.from_pretrained("demo", dtype="float32").model
    settings: dict[str, Any] = (
        dict(steps=8, repeats=5) if which == "full" else dict(steps=64, repeats=25)
    )
    settings["clock"] = time.process_time if clock == "work" else time.perf_counter
    for rows in (1, 8):
        cases: dict[str, Any] = {
            name: dict(constraint=moved(detection_grammar(tokenizer(), labels), model))
            for name, labels in LABELS.items()
        }
        cases["evidence"] = dict(observer=BoxEvidence(model.config.llm.vocab_size - 1152))
        for name, what in cases.items():
            cost = added_cost(model, rows=rows, **settings, **what)
            print(
                f"{which} batch {rows} {name:10}: {1e3 * min(cost.plain):8.3f} ms a step, "
                f"added {cost.minimum:+.1%} (fastest), {cost.median:+.1%} (medians)",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:] or ["demo"])
