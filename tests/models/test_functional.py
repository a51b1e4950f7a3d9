"""The functional form: a nested dict of arrays, and what makes logits of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import paligemma_jax as pg
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.inference_layout import abstract_unstacked
from paligemma_jax.models.paligemma import PaliGemma, abstract_params, flatten, nest
from paligemma_jax.models.quantization import abstract_quantized
from tests.tiny import GEMMA, random_images, random_tokens, tiny_config

INPUTS = (
    jnp.asarray(random_images(2)),
    jnp.asarray(random_tokens(2, 5)),
    jnp.asarray([[0, 0, 0, 1, 1]] * 2),
)


def test_parameters_are_those_of_a_checkpoint(tiny_model: PaliGemma):
    _, params = tiny_model.split()
    shapes = abstract_params(tiny_model.config)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    table = tiny_model.llm.embedder.input_embedding[...]
    assert params["llm"]["embedder"]["input_embedding"] is table  # no copy


def unrolled() -> PaliGemma:
    return abstract_unstacked(tiny_config(GEMMA, depth=11))  # a layer "10", sorted before "2"


@pytest.mark.parametrize("form", ["unrolled", "quantized", "adapters"])
def test_models_of_every_form(form: str, tiny_model: PaliGemma):
    forms: dict[str, Any] = {
        "unrolled": unrolled,
        "quantized": lambda: abstract_quantized(unrolled(), "int4"),
        "adapters": lambda: pg.add_lora(tiny_model, pg.LoRA(rank=2), nnx.Rngs(0)),
    }
    model = forms[form]()
    graphdef, params = model.split()
    sorted_params = jax.tree.map(lambda leaf: leaf, params)  # by name, as any program gives them
    again = graphdef.merge(sorted_params)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    leaves = zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True)
    assert all(found is wanted for found, wanted in leaves)


def test_logits_gradients_and_an_optimizer(tiny_model: PaliGemma):
    """optax and Flax's TrainState, as any program of theirs has them."""
    graphdef, params = tiny_model.split()
    state = TrainState.create(apply_fn=graphdef.apply, params=params, tx=optax.sgd(0.1))

    def loss(params: Any, state: TrainState) -> tuple[jax.Array, jax.Array]:
        logits = state.apply_fn(params, *INPUTS)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, INPUTS[1])
        return losses.mean(), logits

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array, jax.Array]:
        (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, state)
        return state.apply_gradients(grads=gradients), value, logits

    state, before, logits = step(state)
    expected = jax.jit(lambda model: model(*INPUTS))(tiny_model)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-5)
    assert step(state)[1] < before
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    moved = jax.tree.map(lambda new, old: bool((new != old).any()), state.params, params)
    still = {path for path, yes in flatten(moved).items() if not yes}
    assert still <= {"img/blocks/attn/k/bias"}  # softmax takes no notice of it


def test_vmap(tiny_model: PaliGemma):
    """Two models, each with an example of its own."""
    graphdef, params = tiny_model.split()
    other = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, other)
    apply = jax.jit(graphdef.apply)
    rows = jax.tree.map(lambda leaf: leaf[:, None], INPUTS)
    found = jax.jit(jax.vmap(graphdef.apply))(both, *rows)
    for number, each in enumerate((params, other)):
        expected = apply(each, *(leaf[number] for leaf in rows))
        np.testing.assert_allclose(found[number], expected, atol=1e-4, rtol=1e-5)


def test_everything_that_does_not_fit_is_named(tiny_model: PaliGemma):
    graphdef, params = tiny_model.split()
    flat = flatten(params)
    flat["llm/layers/zattn/q_einsum/w"] = flat.pop("llm/layers/attn/q_einsum/w")
    del flat["img/pos_embed"]
    with pytest.raises(ConfigError) as error:
        graphdef.apply(nest(flat), *INPUTS)
    assert "(3 problems)" in str(error.value)
    assert "missing     img/pos_embed" in str(error.value)
    assert "missing     llm/layers/attn/q_einsum/w" in str(error.value)
    assert "unexpected  llm/layers/zattn/q_einsum/w" in str(error.value)
