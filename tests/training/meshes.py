"""A few training steps on a mesh: run by test_sharding.py, here and in processes of their own.

python -m tests.training.meshes '{"data": 2}' ...
python -m tests.training.meshes --coordinator ADDRESS --process N '{"data": 2}'
"""

import argparse
import dataclasses
import json
import sys
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx

from paligemma_jax.models import sharding
from paligemma_jax.models.lora import TRAINABLE, LoRA, add_lora
from paligemma_jax.models.paligemma import split_model
from paligemma_jax.models.quantization import quantize_stacked
from paligemma_jax.models.quantization_config import Int4
from paligemma_jax.models.sharding import Axes, Rules, make_mesh
from paligemma_jax.processing.processor import Batch
from paligemma_jax.training.distributed import place, place_batch, state_shardings
from paligemma_jax.training.optimizer import Constant, OptimizerConfig, RunLength, make_optimizer
from paligemma_jax.training.step import StepConfig, TrainStep, init_state
from tests.tiny import prompts, random_model, tiny_config

ROWS, TEXT = 8, 10


def batch() -> Batch:
    """All rows; between one and four tokens of each are learned."""
    rows = prompts([TEXT] * ROWS, TEXT)
    mask = (np.arange(TEXT)[None] > TEXT - 2 - np.arange(ROWS)[:, None] % 4).astype(np.int32)
    return dataclasses.replace(rows, mask_ar=mask, mask_loss=mask)


def train(
    axes: Axes, steps: int = 3, accumulation: int = 1, recipe: str | None = None
) -> dict[str, Any]:
    """Losses and norms of some steps on the first devices there are for this mesh.

    With a `recipe` adapters are trained, on quantized weights.
    """
    wanted = axes.data * axes.fsdp * axes.tensor
    mesh = make_mesh(axes, jax.devices()[:wanted])
    model = random_model(tiny_config())
    rules = Rules((("img/blocks/.*", None), (".*", Constant())))
    if recipe is not None:
        rounded = quantize_stacked(model, Int4(4) if recipe == "int4" else recipe)
        model = add_lora(rounded, LoRA(rank=2, alpha=4), nnx.Rngs(0))
        rules = Rules(((TRAINABLE, Constant()), (".*", None)))
    graphdef, params = split_model(model)
    config = OptimizerConfig(learning_rate=1e-3, schedules=rules, weight_decay=1e-4)
    optimizer = make_optimizer(config, params, RunLength(total_steps=steps))
    state = init_state(params, config.trainable(params), optimizer, ema=True)
    with mock.patch.object(sharding, "MIN_BYTES", 0):  # all that can be split of a small model is
        shardings = state_shardings(state, mesh)
    state = jax.tree.map(place, state, shardings)
    settings = StepConfig(
        ema=0.9,
        gradient_accumulation_steps=accumulation,
        max_targets=4,
        logit_chunk=2,
    )
    step = TrainStep(graphdef, optimizer, settings, shardings=shardings)
    mine = ROWS // jax.process_count()
    rows = slice(jax.process_index() * mine, (jax.process_index() + 1) * mine)
    given = place_batch(jax.tree.map(lambda x: x[rows], batch()), mesh)
    key = jax.random.key(0)
    seen = []
    for _ in range(steps):
        state, metrics = step(state, given, key)
        seen.append({name: float(metrics[name]) for name in ("loss", "grad_norm", "param_norm")})
    jax.tree.map(lambda x, s: _check(x.sharding, s, x.ndim), state, shardings)
    split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    return {"steps": seen, "split": split}


def _check(found: Any, wanted: Any, ndim: int) -> None:
    assert found.is_equivalent_to(wanted, ndim), (found, wanted)


def main() -> None:
    """Prints a line of JSON for each mesh."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator")
    parser.add_argument("--process", type=int)
    parser.add_argument("meshes", nargs="+")
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, 2, args.process)
    for text in args.meshes:
        sizes = json.loads(text)
        recipe = sizes.pop("recipe", None)
        print(json.dumps(train(Axes(**sizes), recipe=recipe)))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
