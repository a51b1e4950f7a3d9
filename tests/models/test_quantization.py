"""Quantized models: close to what they were made of, in every way through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.abstract import to_params
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.paths import flatten
from paligemma_jax.models.quantization import is_quantized, quantize, quantize_in_place
from paligemma_jax.models.quantized_params import quantize_arrays
from paligemma_jax.models.recipe import Int4, Int8, Int8Dynamic, Mixed, Recipe
from paligemma_jax.models.unrolled import fill, restack, stack_params, unroll
from tests.tiny import GEMMA, GEMMA2, prompts, random_model, tiny_config

CONFIGS = {
    "PaliGemma": tiny_config(GEMMA),
    "PaliGemma 2": tiny_config(GEMMA2),
    "own head": tiny_config(GEMMA, tie_embeddings=False),
}
EVERYTHING = Mixed(image=Int8())
# The largest difference of a logit, of their standard deviation.
RECIPES: dict[str, tuple[Recipe, float]] = {
    "int8": (Int8(), 0.3),
    "int8, dynamic": (Int8Dynamic(), 0.3),
    "int8 everywhere": (EVERYTHING, 0.3),
    "int4": (Int4(group=8), 2.0),
    "int4 of the MLP only": (Mixed(attention=None, mlp=Int4(None), table=None), 2.0),
}
SLOTS = 20


@pytest.fixture(params=CONFIGS, scope="module")
def model(request: pytest.FixtureRequest) -> PaliGemma:
    return random_model(CONFIGS[request.param])


@jax.jit
def _answer(
    model: PaliGemma, images: jax.Array, text: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Logits teacher forced, after a prompt, and after a token more."""
    tokens, mask_ar, mask_input = text
    forced = model(images, tokens, mask_ar)
    logits, cache = model.prefill(model.encode_images(images), tokens, mask_ar, mask_input, SLOTS)
    return forced, logits, model.extend(jnp.full(len(logits), 7, jnp.int32), cache)[0]


def _run(model: PaliGemma) -> list[np.ndarray]:
    batch = prompts([5, 3], 6)
    text = tuple(map(jnp.asarray, (batch.tokens, batch.mask_ar, batch.mask_input)))
    return [np.asarray(x) for x in _answer(model, jnp.asarray(batch.images), text)]


@pytest.mark.parametrize("name", RECIPES)
def test_close_to_the_model(model: PaliGemma, name: str):
    recipe, bound = RECIPES[name]
    for found, wanted in zip(_run(quantize(model, recipe)), _run(model), strict=True):
        assert 0 < np.abs(found - wanted).max() < bound * wanted.std()


@pytest.mark.parametrize("name", RECIPES)
def test_read_parameter_by_parameter(model: PaliGemma, name: str):
    """The same to the bit."""
    recipe = RECIPES[name][0]
    params = flatten(to_params(unroll(model)))
    wanted = quantize(model, recipe)
    found = fill(wanted, dict(quantize_arrays(params.items(), recipe)))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_what_is_rounded(tiny_config: PaliGemmaConfig, tiny_model: PaliGemma):
    found = quantize(tiny_model, EVERYTHING)
    params = flatten(to_params(found))
    floats = {
        path: leaf
        for path, leaf in params.items()
        if not path.endswith(("matrix/values", "matrix/scale"))
    }
    big = {path for path, leaf in floats.items() if leaf.ndim > 1}
    assert big == {"img/patch_embed/kernel", "img/pos_embed"} | {p for p in big if "bias" in p}
    assert params["llm/embedder/matrix/values"].shape == (64, tiny_config.llm.width)


def test_the_model_stays_as_it_is(tiny_model: PaliGemma):
    layers = unroll(tiny_model)
    before = jax.tree.leaves(layers)
    found = quantize(layers, "int8")
    assert not is_quantized(layers) and is_quantized(found)
    assert all(a is b for a, b in zip(jax.tree.leaves(layers), before, strict=True))
    assert found.img.pos_embed[...] is layers.img.pos_embed[...]


def test_in_place(tiny_model: PaliGemma):
    layers = unroll(random_model(tiny_model.config))
    quantize_in_place(layers, "int8")
    jax.tree.map(np.testing.assert_array_equal, layers, quantize(tiny_model, "int8"))


def test_bfloat16(tiny_config: PaliGemmaConfig):
    model = random_model(tiny_config, jnp.bfloat16, jnp.bfloat16)
    for found, wanted in zip(_run(quantize(model, "int8")), _run(model), strict=True):
        assert np.abs(found - wanted).max() < 0.2 * wanted.std()


def test_what_cannot_be_done(tiny_model: PaliGemma):
    found = quantize(tiny_model, "int8")
    with pytest.raises(ConfigError, match="already"):
        quantize(found, "int4")
    with pytest.raises(ConfigError, match="without quantize="):
        list(stack_params(found))
    with pytest.raises(ConfigError, match="without quantize="):
        restack(found)
    assert unroll(found) is found
    with pytest.raises(ConfigError, match="stacked.*unroll"):
        quantize_in_place(tiny_model, "int8")
