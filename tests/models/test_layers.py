"""The layers against their formulas in NumPy, dropout, and how layers and matmuls are run."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.models import layers
from paligemma_jax.models.attention import attention
from paligemma_jax.models.layers import (
    Dropout,
    Jitted,
    LayerNorm,
    RMSNorm,
    fold_layers,
    in_row_blocks,
    init_stacked,
    normal_init,
    scan_layers,
)
from paligemma_jax.models.linear import Dense, Einsum, EinsumAxes
from paligemma_jax.models.masks import Layer, PrefixMask
from paligemma_jax.models.paligemma import PaliGemma, abstract_params, from_params
from tests.tiny import GEMMA, tiny_config


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_layer_norm():
    norm = LayerNorm(8, dtype=jnp.float32, param_dtype=jnp.float32)
    norm.scale[...], norm.bias[...] = normal(8, seed=1), normal(8, seed=2)
    x = 3 * normal(4, 8) + 1
    wanted = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        norm(jnp.asarray(x)), wanted * normal(8, seed=1) + normal(8, seed=2), atol=1e-5
    )


def test_layer_norm_where_the_mean_is_large():
    """E[x^2] - E[x]^2 would be off by 0.2 here."""
    norm = LayerNorm(1152, dtype=jnp.float32, param_dtype=jnp.float32)
    x = 300 + normal(4, 1152)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(jax.jit(norm)(jnp.asarray(x)), exact, atol=1e-4)
    for value in (0.1, 1000.1):
        constant = LayerNorm(8, dtype=jnp.float32, param_dtype=jnp.float32)
        assert np.abs(constant(jnp.full((1, 8), value))).max() < 1


def test_rms_norm_applies_one_plus_scale():
    norm = RMSNorm(8, dtype=jnp.float32, param_dtype=jnp.float32)
    x = normal(4, 8)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(jnp.asarray(x)), wanted, atol=1e-6)
    norm.scale[...] = normal(8, seed=1)
    np.testing.assert_allclose(norm(jnp.asarray(x)), wanted * (1 + normal(8, seed=1)), atol=1e-6)


def test_norms_take_their_statistics_in_float32():
    """In bfloat16 the squares of 300 ... would be off by a percent, and their sum by more."""
    x = jnp.asarray(300 * normal(2, 256))
    for norm_type in (LayerNorm, RMSNorm):
        half = norm_type(256, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        full = norm_type(256, dtype=jnp.float32, param_dtype=jnp.float32)
        out = half(x.astype(jnp.bfloat16))
        assert out.dtype == jnp.bfloat16
        exact = full(x.astype(jnp.bfloat16).astype(jnp.float32))
        np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def test_dense_with_several_axes():
    rngs = nnx.Rngs(0)
    split = Dense((6,), (2, 3), rngs=rngs, dtype=jnp.float32, param_dtype=jnp.float32)
    join = Dense((2, 3), (6,), rngs=rngs, dtype=jnp.float32, param_dtype=jnp.float32)
    split.bias[...], join.bias[...] = normal(2, 3, seed=1), normal(6, seed=2)
    x = normal(4, 5, 6)
    heads = split(jnp.asarray(x))
    wanted = np.einsum("btd,dnh->btnh", x, split.kernel[...]) + normal(2, 3, seed=1)
    np.testing.assert_allclose(heads, wanted, atol=1e-6)
    wanted = np.einsum("btnh,nhd->btd", heads, join.kernel[...]) + normal(6, seed=2)
    np.testing.assert_allclose(join(heads), wanted, atol=1e-5)


def test_einsum_computes_in_the_activation_dtype():
    """float32 weights are rounded to bfloat16, products are summed in float32."""
    layer = Einsum(
        (64, 4), EinsumAxes((0,)), rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.float32
    )
    x = jnp.asarray(normal(2, 64))
    out = layer("BD,DF->BF", x)
    assert layer.w.dtype == jnp.float32 and out.dtype == jnp.bfloat16
    rounded = [np.asarray(a.astype(jnp.bfloat16), np.float32) for a in (x, layer.w[...])]
    wanted = jnp.asarray(rounded[0] @ rounded[1]).astype(jnp.bfloat16)
    np.testing.assert_allclose(
        out.astype(jnp.float32), wanted.astype(jnp.float32), rtol=1 / 128, atol=1e-6
    )


def test_initial_weights_have_variance_one_over_fan_in():
    weights = normal_init(jax.random.key(0), (400, 100), fan_in=25, dtype=jnp.float32)
    assert abs(float(jnp.std(weights)) - 0.2) < 0.004
    assert abs(float(jnp.mean(weights))) < 0.004


KEY = jax.random.key(1)


def test_a_share_is_dropped_and_the_rest_scaled_up():
    dropped = np.asarray(Dropout(KEY, 0.25)(jnp.ones((100, 200))))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert abs((dropped == 0).mean() - 0.25) < 0.02
    x = jnp.ones((3, 4), jnp.bfloat16)
    assert Dropout(KEY, 0.0)(x) is x and Dropout(KEY, 0.5)(x).dtype == x.dtype


def test_places_have_keys_of_their_own():
    x, dropout = jnp.ones((50, 50)), Dropout(KEY, 0.5)
    first, again, other = (np.asarray(dropout.fold_in(place)(x)) for place in (0, 0, 1))
    assert (first == again).all() and 0.4 < (first != other).mean() < 0.6


def test_it_follows_the_norm_of_attention_and_precedes_that_of_the_mlp(tiny_model: PaliGemma):
    graphdef, stacked = nnx.split(tiny_model.llm.layers)
    block: Any = nnx.merge(graphdef, jax.tree.map(lambda w: w[1], stacked))
    x = jax.random.normal(jax.random.key(2), (2, 5, 16))
    mask = PrefixMask.of(jnp.zeros((2, 5), jnp.int32), jnp.ones((2, 5), bool))
    dropout = Dropout(KEY, 0.5)
    q, k, v = block.project(x, mask.query_positions)
    mixed = attention(q, k, v, mask, 1, block.softcap)
    middle = x + dropout.fold_in(0)(block.post_attention_norm(block.attn.output(mixed)))
    mlp = dropout.fold_in(1)(block.mlp(block.pre_ffw_norm(middle)))
    wanted = middle + block.post_ffw_norm(mlp)
    found = block.finish(x, q, k, v, mask, 1, dropout)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


WIDTH, DEPTH = 16, 5


def apply(layer: Einsum, x: jax.Array, index: Layer) -> jax.Array:
    return jnp.tanh(layer("bi,io->bo", x)) + index


def test_folding_is_scanning():
    for dtype in (jnp.float32, jnp.bfloat16):
        kw = dict(dtype=dtype, param_dtype=dtype)
        layers = init_stacked(
            lambda rngs, kw=kw: Einsum((WIDTH, WIDTH), EinsumAxes((0,)), rngs=rngs, **kw),
            DEPTH,
            nnx.Rngs(0),
        )
        x = jax.random.normal(jax.random.key(0), (3, WIDTH), dtype)
        one = jax.jit(lambda layers, x: scan_layers(layers, apply, x))(layers, x)
        other = jax.jit(lambda layers, x: fold_layers(layers, apply, x))(layers, x)
        np.testing.assert_allclose(np.float32(one), np.float32(other), atol=2e-2)


def test_decoding_in_bfloat16_does_not_widen_all_layers():
    """Temporary memory of a step is far below the weights, whose float32 copy would be twice."""
    config = tiny_config(GEMMA)
    llm = dataclasses.replace(config.llm, width=256, depth=12, mlp_dim=1024)
    config = dataclasses.replace(config, llm=llm)
    params = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(config, jnp.bfloat16)
    )
    layers = sum(leaf.size * 2 for leaf in jax.tree.leaves(params["llm"]["layers"]))

    def prefill(params, tokens):
        model = from_params(config, params, jnp.bfloat16)
        none = jnp.zeros((1, 0, llm.width), jnp.bfloat16)
        return model.prefill(none, tokens, tokens * 0, tokens == tokens, 16)

    def steps(params, token, leaves):
        model = from_params(config, params, jnp.bfloat16)

        def body(carry):
            token, cache, left = carry
            logits, cache = model.extend(token, cache)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache, left - 1

        start = (token, jax.tree.unflatten(structure, leaves), 8)
        return jax.lax.while_loop(lambda carry: carry[2] > 0, body, start)[0]

    tokens = jnp.ones((1, 4), jnp.int32)
    _, cache = jax.jit(prefill)(params, tokens)
    leaves, structure = jax.tree.flatten(cache)
    programs = ((prefill, (params, tokens)), (steps, (params, tokens[:, 0], leaves)))
    for program, args in programs:
        analysis = jax.jit(program).lower(*args).compile().memory_analysis()
        assert analysis is not None
        assert analysis.temp_size_in_bytes < layers, program.__name__


@pytest.mark.parametrize("count", [1, 64, 128, 130, 700])
def test_blocks(monkeypatch: pytest.MonkeyPatch, count: int):
    monkeypatch.setattr(layers, "BLOCK", 128 * 5)
    rng = np.random.default_rng(0)
    w, scale = rng.normal(size=(count, 5)), rng.normal(size=(count, 1))
    x = rng.normal(size=(3, 5))
    sizes = []

    def product(w: jax.Array, scale: jax.Array) -> jax.Array:
        sizes.append(len(w))
        return w @ x.T * scale

    y = in_row_blocks(product, jnp.asarray(w), jnp.asarray(scale), columns=5)
    np.testing.assert_allclose(y, w @ x.T * scale, rtol=1e-4, atol=1e-5)
    assert max(sizes) <= 128


@pytest.fixture(autouse=True)
def _asks_again() -> Iterator[None]:
    layers._has_options.cache_clear()
    yield
    layers._has_options.cache_clear()


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(layers, "backend", lambda: request.param)
    return request.param


def _programs(function: Jitted) -> list[int]:
    return [getattr(f, "_cache_size")() for f in (function._plain, function._with_options)]  # noqa: B009


def _double(**how: Any) -> Jitted:
    def double(x: jax.Array, times: int = 2) -> jax.Array:
        """Doc."""
        return x * times

    return Jitted(double, **how)


def test_as_jit(device: str):
    twice = _double(static_argnames=("times",))
    assert twice(jnp.ones(3)).tolist() == [2, 2, 2]
    assert twice(jnp.ones(3), times=3).tolist() == [3, 3, 3]
    assert _programs(twice) == ([2, 0] if device == "cpu" else [0, 2])
    assert twice.lower(jnp.ones(3)).compile()(jnp.ones(3)).tolist() == [2, 2, 2]
    assert twice.__doc__ == "Doc."


def test_inside_of_another_function(device: str):
    twice = _double()
    assert jax.jit(lambda x: twice(twice(x)))(jnp.ones(1)) == 4
    assert jax.grad(lambda x: twice(x))(1.0) == 2


def test_options_that_XLA_does_not_know_are_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layers, "backend", lambda: "gpu")
    monkeypatch.setattr(layers, "_OPTIONS", {"xla_gpu_of_yesterday": True})
    twice = _double()
    assert twice(jnp.ones(1)) == 2
    assert _programs(twice) == [1, 0]
