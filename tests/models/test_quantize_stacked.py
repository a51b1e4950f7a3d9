"""Quantized stacked layers, and adapters trained on them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.inference_layout import unstack_layers
from paligemma_jax.models.lora import LoRA, adapters, add_lora, merge_lora
from paligemma_jax.models.paligemma import PaliGemma, flatten, to_params
from paligemma_jax.models.quantization import quantize, quantize_stacked
from paligemma_jax.models.quantization_config import Int4, Int8, Int8Dynamic, QuantizationConfig
from paligemma_jax.models.quantized_matrix import quantize_matrix
from tests.models.test_lora import (
    EINSUM_AXES,
    EQUATIONS,
    EVERYTHING,
    einsum_layer,
    inputs,
    run,
    trained,
)
from tests.tiny import GEMMA, SIGLIP, random_model

FORMAT = QuantizationConfig(attention=Int4(8), embedding=None)


@pytest.fixture(scope="module")
def base(tiny_model: PaliGemma) -> PaliGemma:
    return quantize_stacked(tiny_model, FORMAT)


@pytest.mark.slow
def test_the_same_numbers_as_one_by_one(tiny_model: PaliGemma):
    quantization = QuantizationConfig(attention=Int4(8), image=Int8())
    base, one_by_one = (
        quantize_stacked(tiny_model, quantization),
        quantize(tiny_model, quantization),
    )
    np.testing.assert_allclose(run(base), run(one_by_one), atol=1e-4, rtol=1e-5)
    model = add_lora(base, LoRA(rank=2, targets=EVERYTHING), nnx.Rngs(0))
    assert all(layer.matrix is not None for layer in adapters(model).values())
    np.testing.assert_allclose(run(model), run(base), atol=1e-5)


def test_paths(tiny_model: PaliGemma, base: PaliGemma):
    params = flatten(to_params(base))
    for layer in EINSUM_AXES:
        assert f"llm/layers/{layer}/matrix/values" in params
        assert f"llm/layers/{layer}/w" not in params
        assert f"llm/layers/{layer}/w" in flatten(to_params(tiny_model))


def test_products_and_gradients_are_those_of_the_rounded_weight():
    """The gradient that adapters in lower layers get comes through here."""
    rng = np.random.default_rng(0)
    layers, plain, xs = {}, {}, {}
    for name, (_, of_x, of_w) in EQUATIONS.items():
        axes = EINSUM_AXES[name]
        outs = [axis for axis in range(len(of_w)) if axis not in axes.inputs]
        order = (*outs, *axes.inputs)
        rows = math.prod(of_w[axis] for axis in outs)
        weights = rng.normal(size=(rows, math.prod(of_w) // rows)).astype(np.float32)
        matrix = quantize_matrix(jnp.asarray(weights), Int4(None))
        rounded = np.asarray(matrix.take(jnp.arange(rows)))
        rounded = rounded.reshape([of_w[axis] for axis in order]).transpose(np.argsort(order))
        plain[name] = einsum_layer(rounded, axes)
        layers[name] = plain[name].with_matrix(matrix)
        xs[name] = rng.normal(size=of_x).astype(np.float32)

    @jax.jit
    def both(layers: Any, xs: Any) -> Any:
        def run(xs: Any) -> Any:
            return {name: layers[name](EQUATIONS[name][0], x) for name, x in xs.items()}

        values, pull_back = jax.vjp(run, xs)
        return values, pull_back(jax.tree.map(jnp.sin, values))[0]

    for mine, theirs in zip(both(layers, xs), both(plain, xs), strict=True):
        for name in EQUATIONS:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-4)


def test_adapters_on_a_base_of_few_bits(base: PaliGemma):
    model = add_lora(base, LoRA(rank=2), nnx.Rngs(0))
    assert all(layer.matrix is not None for layer in adapters(model).values())

    def split(model: PaliGemma) -> Any:
        return nnx.split(model, lambda path, _: str(path[-1]).startswith("lora_"), ...)

    graphdef, params, others = split(model)

    @jax.jit
    def gradient(params: Any) -> tuple[jax.Array, Any]:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(jnp.square(nnx.merge(graphdef, params, others)(*inputs())))

        return jax.value_and_grad(loss)(params)

    at_first, _ = gradient(params)
    np.testing.assert_allclose(at_first, jnp.mean(jnp.square(run(base))), rtol=1e-5)
    _, params, _ = split(trained(model))
    loss, gradients = gradient(params)
    for path, array in flatten(nnx.to_pure_dict(gradients)).items():
        assert path.endswith("lora_scale") or np.any(array), path
    step = jax.tree.map(lambda w, g: w - 1e-2 * g, params, gradients)
    assert gradient(step)[0] < loss


@pytest.mark.slow
def test_training_never_holds_the_weights_in_floats():
    llm = dataclasses.replace(GEMMA, width=256, mlp_dim=1024, depth=8)
    config = PaliGemmaConfig(img=SIGLIP, llm=llm, text_length=16)
    base = quantize_stacked(random_model(config), "int8")
    model = add_lora(base, LoRA(rank=1), nnx.Rngs(0))
    graphdef, params, others = nnx.split(
        model, lambda path, _: str(path[-1]).startswith("lora_"), ...
    )

    def loss(params: Any, others: Any) -> jax.Array:
        return jnp.sum(nnx.merge(graphdef, params, others)(*inputs()))

    program = jax.jit(jax.grad(loss)).lower(params, others).compile().memory_analysis()
    assert program is not None
    weights = sum(leaf.size for leaf in jax.tree.leaves(base.llm.layers))
    assert program.temp_size_in_bytes < 1.5 * weights  # and not 4 bytes of each


def test_what_cannot_be(tiny_model: PaliGemma, base: PaliGemma):
    with pytest.raises(ConfigError, match="Int8Dynamic.*no gradient"):
        quantize_stacked(tiny_model, QuantizationConfig(mlp=Int8Dynamic()))
    with pytest.raises(ConfigError, match="unstacked.*quantize_stacked"):
        quantize_stacked(unstack_layers(tiny_model), "int8")
    with pytest.raises(ConfigError, match="quantized already"):
        quantize_stacked(base, "int8")
    with pytest.raises(ConfigError, match="quantized, and those they were made of are gone"):
        unstack_layers(base)
    with pytest.raises(ConfigError, match="quantized.*save_adapter"):
        merge_lora(add_lora(base, LoRA(), nnx.Rngs(0)))
