"""The layers against their formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paligemma_jax.models.layers import LayerNorm, RMSNorm, normal_init
from paligemma_jax.models.linear import Dense, Einsum, EinsumAxes


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
