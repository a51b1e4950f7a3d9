"""A model with its layers one by one is the same model, and is put together again without loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.gemma import FusedAttention
from paligemma_jax.models.inference_layout import (
    is_unstacked,
    stack_layers,
    stacked_params,
    unstack_layers,
    unstacked_params,
)
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.paligemma import PaliGemma, flatten, to_params
from tests.tiny import GEMMA, GEMMA2, prompts, random_images, random_model, tiny_config

CONFIGS = {
    "PaliGemma": tiny_config(GEMMA),
    "PaliGemma 2": tiny_config(GEMMA2, sliding_window=4),
    "own head": tiny_config(GEMMA, tie_embeddings=False),
}
SLOTS = 20


@pytest.fixture(params=CONFIGS, scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[PaliGemma, PaliGemma]:
    """A stacked model and the same one unrolled."""
    model = random_model(CONFIGS[request.param])
    return model, unstack_layers(model)


def close(one: object, other: object) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, other)


def test_forward(pair: tuple[PaliGemma, PaliGemma]):
    batch = prompts([5, 3], 6)
    inputs = [jnp.asarray(x) for x in (batch.images, batch.tokens, batch.mask_ar)]
    forward = jax.jit(lambda model: model(*inputs))
    close(*map(forward, pair))


def test_prefill_and_extend(pair: tuple[PaliGemma, PaliGemma]):
    batch = prompts([5, 3], 6)
    text = [jnp.asarray(x) for x in (batch.tokens, batch.mask_ar, batch.mask_input)]

    @jax.jit
    def read(model: PaliGemma) -> tuple[jax.Array, KVCache]:
        images = model.encode_images(jnp.asarray(batch.images))
        return model.prefill(images, text[0], text[1], text[2], SLOTS)

    @jax.jit
    def extend(
        model: PaliGemma, logits: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache, jax.Array]:
        group = jnp.array([[0, 0, 1], [0, 1, 1]])
        branches = model.packed_continuations(text[0][:, :3], group, cache)
        return *model.extend(jnp.argmax(logits, axis=1).astype(jnp.int32), cache), branches

    def run(model: PaliGemma) -> tuple[jax.Array, ...]:
        logits, cache = read(model)
        found = [logits]
        for _ in range(3):
            logits, cache, branches = extend(model, logits, cache)
            found += [logits, branches]
        return (*found, *cache.read(0), *cache.read(2))

    close(*map(run, pair))


def test_watch(pair: tuple[PaliGemma, PaliGemma]):
    batch = prompts([5, 3], 6)
    text = [jnp.asarray(x) for x in (batch.tokens, batch.mask_ar, batch.mask_input)]

    @jax.jit
    def run(model: PaliGemma) -> tuple[jax.Array, jax.Array]:
        images = model.encode_images(jnp.asarray(random_images(2)))
        seen = jnp.zeros((model.config.llm.depth,))
        return model.hidden_with_attention(
            images,
            text[0],
            text[1],
            text[2],
            lambda seen, weights, i: seen.at[i].set(weights[0, 1, 2, 3]),
            seen,
        )

    close(*map(run, pair))


def test_comes_together_again_bit_by_bit(pair: tuple[PaliGemma, PaliGemma]):
    model, layers = pair
    assert is_unstacked(layers) and not is_unstacked(model)
    wanted = flatten(to_params(model))
    for form in pair:
        found = {path: make() for path, make in stacked_params(form)}
        assert set(found) == set(wanted)
        for path, array in wanted.items():
            np.testing.assert_array_equal(found[path], array, err_msg=path)
    again = stack_layers(layers)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, again, model)
    assert stack_layers(model) is model


def test_unrolling_twice_is_unrolling_once(pair: tuple[PaliGemma, PaliGemma]):
    assert unstack_layers(pair[1]) is pair[1]


def test_targets_and_the_views_of_their_pieces(pair: tuple[PaliGemma, PaliGemma]):
    """Writing each stacked layer through the view of its piece makes the unrolled parameter."""
    model, layers = pair
    params = flatten(to_params(model))
    wanted = flatten(to_params(layers))
    found = unstacked_params(model.config)
    assert {path for target in found for path in target.paths} == set(wanted)
    assert {piece.path for target in found for piece in target.pieces} == set(params)
    for target in found:
        for layer, path in enumerate(target.paths):
            array = np.full(target.shape, np.nan, np.float32)
            for piece in target.pieces:
                stacked = np.asarray(params[piece.path])
                piece.view(array)[...] = stacked if target.depth is None else stacked[layer]
            np.testing.assert_array_equal(array, wanted[path], err_msg=path)


def test_gradients_go_through(tiny_model: PaliGemma):
    """An unrolled model can be trained too; its program is larger."""
    batch = prompts([5, 3], 6)
    inputs = [jnp.asarray(x) for x in (batch.images, batch.tokens, batch.mask_ar)]

    def loss(model: PaliGemma) -> jax.Array:
        return jnp.mean(jnp.square(model(*inputs)))

    gradient = jax.jit(jax.grad(loss))
    wanted = flatten(to_params(gradient(tiny_model)))
    for path, make in stacked_params(gradient(unstack_layers(tiny_model))):
        np.testing.assert_allclose(make(), wanted[path], atol=1e-3, rtol=1e-3, err_msg=path)


def test_bfloat16_on_one_row_is_bfloat16_on_two(tiny_config: PaliGemmaConfig):
    """Where one row is padded to two, the numbers stay those of the row."""
    model = unstack_layers(random_model(tiny_config, jnp.bfloat16, jnp.bfloat16))
    batch = prompts([5, 5], 6)

    @jax.jit
    def run(images: jax.Array, *text: jax.Array) -> jax.Array:
        encoded = model.encode_images(images)
        logits, cache = model.prefill(encoded, text[0], text[1], text[2], SLOTS)
        return model.extend(jnp.full(logits.shape[:1], 7, jnp.int32), cache)[0]

    def of(rows: int) -> np.ndarray:
        inputs = (batch.images, batch.tokens, batch.mask_ar, batch.mask_input)
        return np.asarray(run(*(jnp.asarray(x)[:rows] for x in inputs)))

    np.testing.assert_allclose(of(1)[0], of(2)[0], atol=0.1)


def test_layers_are_a_list(pair: tuple[PaliGemma, PaliGemma]):
    layers = pair[1].llm.layers
    assert isinstance(layers, nnx.List) and len(layers) == pair[1].config.llm.depth
    config = pair[1].config.llm
    attn = layers[0].attn
    assert isinstance(attn, FusedAttention)
    assert attn.qkv.w.shape == (
        config.num_heads + 2 * config.num_kv_heads,
        config.head_dim,
        config.width,
    )
