"""Stacked layers of few bits, and adapters trained on them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.abstract import to_params
from paligemma_jax.models.einsum_axes import EINSUM_AXES
from paligemma_jax.models.layers import Einsum
from paligemma_jax.models.lora import LoRA, adapters, add_lora, merge_lora
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.paths import flatten
from paligemma_jax.models.quantization import quantize
from paligemma_jax.models.quantized_einsum import QuantizedEinsum, quantize_stacked
from paligemma_jax.models.recipe import Int4, Int8, Int8Dynamic, Mixed
from paligemma_jax.models.unrolled import unroll
from tests.models.test_lora import EQUATIONS, EVERYTHING, inputs, run, trained

RECIPE = Mixed(attention=Int4(8), image=Int8())


@pytest.fixture(scope="module")
def base(tiny_model: PaliGemma) -> PaliGemma:
    return quantize_stacked(tiny_model, RECIPE)


def test_the_same_numbers_as_one_by_one(tiny_model: PaliGemma, base: PaliGemma):
    one_by_one = quantize(tiny_model, RECIPE)
    np.testing.assert_allclose(run(base), run(one_by_one), atol=1e-4, rtol=1e-5)
    params = flatten(to_params(base))
    for layer in EINSUM_AXES:
        assert f"llm/layers/{layer}/matrix/values" in params
        assert f"llm/layers/{layer}/w" not in params
        assert f"llm/layers/{layer}/w" in flatten(to_params(tiny_model))


@pytest.mark.parametrize("name", EQUATIONS)
def test_products_and_gradients_are_those_of_the_rounded_weight(name: str):
    """The gradient that adapters in lower layers get comes through here."""
    equation, of_x, of_w = EQUATIONS[name]
    axes, rng = EINSUM_AXES[name], np.random.default_rng(0)
    outs = [axis for axis in range(len(of_w)) if axis not in axes.inputs]
    order = (*outs, *axes.inputs)
    turned = tuple(of_w[axis] for axis in order)
    rows = math.prod(of_w[axis] for axis in outs)
    weights = jnp.asarray(rng.normal(size=(rows, math.prod(of_w) // rows)), jnp.float32)
    matrix = Int4(None).store(weights)
    rounded = np.asarray(matrix.take(jnp.arange(rows))).reshape(turned)
    layer = QuantizedEinsum(matrix, of_w, axes, jnp.float32)
    base = Einsum(of_w, fan_in=1, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    base.w[...] = jnp.asarray(rounded.transpose(np.argsort(order)))
    x = jnp.asarray(rng.normal(size=of_x), jnp.float32)

    @jax.jit
    def both(layer: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, pull_back = jax.vjp(lambda x: layer(equation, x), x)
        return value, pull_back(jnp.sin(value))[0]

    for mine, theirs in zip(both(layer, x), both(base, x), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-4)


def test_adapters_on_a_base_of_few_bits(base: PaliGemma):
    model = add_lora(base, LoRA(rank=2, targets=EVERYTHING), nnx.Rngs(0))
    assert {type(layer).__name__ for layer in adapters(model).values()} == {
        "LoRAQuantizedEinsum",
        "LoRAQuantizedDense",
    }
    np.testing.assert_allclose(run(model), run(base), atol=1e-5)
    graphdef, params, others = nnx.split(
        trained(model), lambda path, _: str(path[-1]).startswith("lora_"), ...
    )

    @jax.jit
    def gradient(params: Any) -> tuple[jax.Array, Any]:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(jnp.square(nnx.merge(graphdef, params, others)(*inputs())))

        return jax.value_and_grad(loss)(params)

    loss, gradients = gradient(params)
    for path, array in flatten(nnx.to_pure_dict(gradients)).items():
        assert path.endswith("lora_scale") or np.any(array), path
    step = jax.tree.map(lambda w, g: w - 1e-2 * g, params, gradients)
    assert gradient(step)[0] < loss


def test_what_cannot_be(tiny_model: PaliGemma, base: PaliGemma):
    with pytest.raises(ConfigError, match="Int8Dynamic.*no gradient"):
        quantize_stacked(tiny_model, Mixed(mlp=Int8Dynamic()))
    with pytest.raises(ConfigError, match="one by one.*quantize_stacked"):
        quantize_stacked(unroll(tiny_model), "int8")
    with pytest.raises(ConfigError, match="QuantizedEinsum already"):
        quantize_stacked(base, "int8")
    with pytest.raises(ConfigError, match="quantized, and those they were made of are gone"):
        unroll(base)
    with pytest.raises(ConfigError, match="quantized.*save_adapter"):
        merge_lora(add_lora(base, LoRA(), nnx.Rngs(0)))
