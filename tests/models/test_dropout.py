"""Dropout: what it does to activations, and where in a layer it stands."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paligemma_jax.models.attention import attention
from paligemma_jax.models.layers import Dropout
from paligemma_jax.models.masks import PrefixMask
from paligemma_jax.models.paligemma import PaliGemma

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
