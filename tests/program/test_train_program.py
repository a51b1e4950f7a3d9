"""What a training step is on a GPU: no copy of weights or moments, and little beside them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from paligemma_jax.models.lora import TRAINABLE, LoRA, add_lora
from paligemma_jax.models.paligemma import PaliGemma, abstract_model
from paligemma_jax.models.sharding import Rules
from paligemma_jax.training.memory_plan import BatchShape, estimate_memory
from paligemma_jax.training.optimizer import AdamW, Constant, OptimizerConfig
from paligemma_jax.training.step import StepConfig
from tests.program.ours import train_step, variant
from tests.program.target import Target

pytestmark = pytest.mark.program

MODEL = "paligemma-3b-pt-224"
SHAPE = BatchShape(examples=32, text=64)
STEP = StepConfig(max_targets=32)


def _with_adapters(model: PaliGemma) -> PaliGemma:
    return nnx.eval_shape(lambda: add_lora(model, LoRA(rank=8), nnx.Rngs(0)))


def _optimizer(trained: str) -> OptimizerConfig:
    rules = ((trained, Constant()),)
    rest = () if trained == ".*" else ((".*", None),)
    return OptimizerConfig(
        learning_rate=1e-5, optimizer=AdamW(weight_decay=0.0), schedules=Rules((*rules, *rest))
    )


@pytest.mark.parametrize(("adapters", "most"), [(True, 5.2e9), (False, 15.5e9)])
def test_a_step_holds_gradients_and_activations_once(h200: Target, adapters: bool, most: float):
    model = abstract_model(variant(MODEL), jnp.bfloat16, jnp.bfloat16)
    model = _with_adapters(model) if adapters else model
    optimizer = _optimizer(TRAINABLE if adapters else ".*")
    compiled, state = train_step(h200, model, optimizer, STEP, SHAPE)
    moving = (state.trainable, state.opt_state)
    assert compiled.aliased >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(moving))
    assert compiled.temporaries < most
    plan = estimate_memory(model, optimizer, STEP, SHAPE)
    assert compiled.arguments + compiled.temporaries == pytest.approx(plan.total, rel=0.15)
