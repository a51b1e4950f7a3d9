"""Stacked layers: both ways of running them agree, and inference in bfloat16 stays small."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paligemma_jax.models.layers import fold_layers, init_stacked, scan_layers
from paligemma_jax.models.linear import Einsum, EinsumAxes
from paligemma_jax.models.masks import Layer
from paligemma_jax.models.paligemma import abstract_params, from_params
from tests.tiny import GEMMA, tiny_config

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
