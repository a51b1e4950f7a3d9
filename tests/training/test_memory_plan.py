"""What the planner says is what XLA reserves, and what must follow from arithmetic."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from paligemma_jax.config import VARIANTS, GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.models.paligemma import abstract_model, parameter_count
from paligemma_jax.models.sharding import Axes, Rules
from paligemma_jax.training.memory_plan import (
    RUN,
    BatchShape,
    MemoryEstimate,
    StepShapes,
    estimate_memory,
    ways_to_fit,
)
from paligemma_jax.training.optimizer import SGD, Constant, OptimizerConfig, make_optimizer
from paligemma_jax.training.step import StepConfig, TrainStep
from tests.goldens import optimized
from tests.tiny import tiny_config

MIDDLE = PaliGemmaConfig(
    img=SigLIPConfig(image_size=112, width=192, depth=4, mlp_dim=768, num_heads=4),
    llm=GemmaConfig(
        width=256,
        depth=6,
        mlp_dim=1024,
        num_heads=4,
        num_kv_heads=1,
        head_dim=64,
        query_scale=64**-0.5,
        vocab_size=8192,
    ),
)
ADAM = OptimizerConfig(learning_rate=1e-3)
ACCUMULATING = StepConfig(remat="dots", gradient_accumulation_steps=2, ema=0.9)
ATTENTION = OptimizerConfig(
    learning_rate=1e-3, schedules=Rules((("llm/layers/attn/.*", Constant()), (".*", None)))
)


model = functools.cache(abstract_model)


@functools.cache
def plan(
    config: PaliGemmaConfig,
    step: StepConfig | None = None,
    rows: int = 16,
    optimizer: OptimizerConfig = ADAM,
    text: int = 32,
    **kw: Any,
) -> MemoryEstimate:
    shape = BatchShape(examples=rows, text=text)
    return estimate_memory(model(config), optimizer, step or StepConfig(), shape, **kw)


def compiled_memory(model: Any, optimizer: OptimizerConfig, step: StepConfig, rows: int) -> int:
    """Bytes that XLA reserves on one device for what `estimate_memory` estimates."""
    shape = BatchShape(examples=rows, text=32)
    shapes = StepShapes.of(model, optimizer, step, shape, Axes(), jnp.float32)
    transformation = make_optimizer(optimizer, shapes.graphdef.paths, RUN)
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = TrainStep(shapes.graphdef, transformation, step).lower(
        shapes.state, shapes.batch, key
    )
    found: Any = program.compile().memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + new


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "rows", "step", "optimizer"),
    [
        (tiny_config(), 64, StepConfig(), ADAM),
        (MIDDLE, 16, StepConfig(remat="none"), ATTENTION),
        (
            MIDDLE,
            16,
            StepConfig(remat="dots", gradient_accumulation_steps=2, ema=0.9),
            ADAM,
        ),
    ],
)
def test_plans_are_within_a_tenth_of_what_is_reserved(
    config: PaliGemmaConfig, rows: int, step: StepConfig, optimizer: OptimizerConfig
):
    with optimized():
        reserved = compiled_memory(abstract_model(config), optimizer, step, rows)
    assert plan(config, step, rows, optimizer).total == pytest.approx(reserved, rel=0.1)


def test_weights_and_moments_of_a_published_model():
    config = VARIANTS["paligemma-3b-pt-224"]
    count = parameter_count(config)
    full = plan(config, rows=8)
    assert full.trainable == full.gradients == 4 * count
    assert full.optimizer == pytest.approx(8 * count, abs=16)
    shape = BatchShape(examples=8, text=32)
    sgd = OptimizerConfig(learning_rate=0.03, optimizer=SGD(), schedules=ATTENTION.schedules)
    some = estimate_memory(
        abstract_model(config, jnp.bfloat16, jnp.bfloat16), sgd, StepConfig(), shape
    )
    assert some.trainable + 2 * some.frozen == pytest.approx(4 * count, rel=1e-6)
    assert some.optimizer < 100 and some.total < 9e9  # a card of 16 GB is enough
    assert "total" in str(some) and "trainable" in str(some)


def test_more_devices_hold_less_each():
    one, four = plan(MIDDLE, rows=16), plan(MIDDLE, rows=16, axes=Axes(fsdp=4))
    assert four.kept < one.kept / 3 and four.resident < one.resident
    alone = plan(MIDDLE, rows=4)
    assert plan(MIDDLE, rows=16, axes=Axes(data=4)).total == alone.total


def test_what_is_kept():
    keep_all, products, inputs = (
        plan(MIDDLE, StepConfig(remat=remat)) for remat in ("none", "dots", "full")
    )
    assert inputs.kept < products.kept / 4 < keep_all.kept / 12
    assert inputs.layer > products.layer > keep_all.layer


@pytest.mark.slow
def test_ways_to_fit():
    def ways(memory: int) -> list[tuple[str, int]]:
        found = ways_to_fit(memory, lambda step: plan(MIDDLE, step, rows=4), StepConfig(), 4)
        assert all(plan.total <= memory for _, plan in found)
        return [(step.remat, step.gradient_accumulation_steps) for step, _ in found]

    least = plan(MIDDLE, rows=4).total
    assert ways(10 * least)[0] == ("none", 1)
    few = ways(least)
    assert ("full", 1) in few and ("none", 1) not in few
