"""The decoder's parts: embedding scale, output heads, layers run one after another."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paligemma_jax.models.gemma import Embedder, Gemma, look_up
from paligemma_jax.models.masks import PrefixMask
from paligemma_jax.models.paligemma import PaliGemma
from tests.tiny import GEMMA, GEMMA2, random_model, random_tokens, tiny_config


def test_text_embeddings_are_scaled_by_the_root_of_the_width():
    config = dataclasses.replace(GEMMA, width=12)
    embedder = Embedder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    tokens = random_tokens(2, 3)
    wanted = np.asarray(embedder.input_embedding[...])[tokens] * np.float32(12**0.5)
    np.testing.assert_allclose(embedder.encode(jnp.asarray(tokens)), wanted, rtol=1e-6)


def test_the_scale_is_rounded_to_the_dtype_of_the_table():
    """sqrt(3584) is 59.87 but 59.75 in bfloat16, and big_vision takes the latter."""
    config = dataclasses.replace(GEMMA, width=3584, vocab_size=4)
    embedder = Embedder(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.bfloat16)
    embedder.input_embedding[...] = jnp.ones((4, 3584), jnp.bfloat16)
    encoded = embedder.encode(jnp.zeros((1, 1), jnp.int32))
    assert encoded.dtype == jnp.float32
    np.testing.assert_array_equal(encoded, 59.75)


def _inputs(config_width: int) -> tuple[jax.Array, jax.Array, PrefixMask]:
    """Causal, and in even layers every token sees itself alone."""
    x = jax.random.normal(jax.random.key(0), (2, 5, config_width))
    mask = PrefixMask.of(jnp.ones((2, 5), jnp.int32), jnp.ones((2, 5), bool), window=1)
    return x, mask.query_positions, mask


def test_scan_equals_the_layers_one_by_one(tiny_model: PaliGemma):
    """Masks are taken in turn: even layers the first, odd layers the second."""
    llm = tiny_model.llm
    x, positions, mask = _inputs(llm.config.width)
    scanned = jax.jit(lambda llm, *args: llm(*args))(llm, x, positions, mask)
    graphdef, params = nnx.split(llm.layers)

    @jax.jit
    def layer(params: nnx.State, x: jax.Array, index: jax.Array) -> jax.Array:
        block: Any = nnx.merge(graphdef, params)
        q, k, v = block.project(x, positions)
        return block.finish(x, q, k, v, mask, index)

    for index in range(llm.config.depth):
        x = layer(jax.tree.map(lambda leaf, i=index: leaf[i], params), x, jnp.asarray(index))
    np.testing.assert_allclose(scanned, llm.final_norm(x), atol=1e-5)


def test_tied_head_is_the_table(tiny_model: PaliGemma):
    llm = tiny_model.llm
    x = jax.random.normal(jax.random.key(0), (1, 2, llm.config.width))
    wanted = 30 * np.tanh(np.asarray(x @ llm.embedder.input_embedding[...].T) / 30)
    np.testing.assert_allclose(llm.logits(x), wanted, atol=1e-5)


def test_untied_head_has_its_own_weights():
    llm = random_model(tiny_config(GEMMA2, tie_embeddings=False, final_logit_softcap=0.0)).llm
    assert isinstance(llm, Gemma)
    x = jax.random.normal(jax.random.key(0), (1, 2, llm.config.width))
    np.testing.assert_allclose(llm.logits(x), x @ llm.lm_head.w[...].T, atol=1e-5)
    assert np.abs(llm.lm_head.w[...] - llm.embedder.input_embedding[...]).max() > 0.1


def test_logits_are_float32_in_bfloat16():
    model = random_model(tiny_config(), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert model.llm.logits(jnp.ones((1, 1, GEMMA2.width), jnp.bfloat16)).dtype == jnp.float32


def test_rows_of_a_bfloat16_table_are_looked_up_without_widening_it():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(512, 64)), jnp.bfloat16)
    tokens = jnp.asarray([[3, 511, 0], [7, 3, 3]])
    np.testing.assert_array_equal(look_up(table, tokens), table[tokens])
    compiled = jax.jit(look_up).lower(table, tokens).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes < table.nbytes
    gradient = jax.grad(lambda table: jnp.sum(jnp.square(look_up(table, tokens))))(table)
    wanted = jax.grad(lambda table: jnp.sum(jnp.square(table[tokens])))(table)
    np.testing.assert_allclose(np.float32(gradient), np.float32(wanted), atol=0.05)
