"""The Linen module: the same parameters, the same logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from flax.errors import ScopeCollectionNotFound, ScopeParamShapeError

import paligemma_jax as pg
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.paligemma import abstract_params, flatten, nest
from tests.tiny import GEMMA, GEMMA2, random_images, random_model, random_tokens, tiny_config

IMAGES, TOKENS = jnp.asarray(random_images(2)), jnp.asarray(random_tokens(2, 5))
MASK_AR = jnp.asarray([[0, 0, 0, 1, 1]] * 2)
INPUTS = (IMAGES, TOKENS, MASK_AR)


def shapes_of(params: Any) -> dict[str, Any]:
    return {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(params).items()}


@pytest.mark.parametrize("llm", [GEMMA, GEMMA2], ids=["gemma", "gemma2"])
def test_parameters_and_logits(llm: pg.GemmaConfig):
    model = random_model(tiny_config(llm))
    module = pg.to_linen(model.config)
    variables = jax.eval_shape(module.init, jax.random.key(0), *INPUTS)
    assert set(variables) == {"params"}
    assert shapes_of(variables["params"]) == shapes_of(abstract_params(model.config))
    params = {"params": model.split()[1]}
    apply, run = jax.jit(module.apply), jax.jit(lambda model, *inputs: model(*inputs))
    for images in (IMAGES, IMAGES[:, :0]):  # the latter: text alone
        found = apply(params, images, TOKENS, MASK_AR)
        np.testing.assert_array_equal(found, run(model, images, TOKENS, MASK_AR))


class Scored(linen.Module):
    """A module of somebody's own with the model in it."""

    config: pg.PaliGemmaConfig

    @linen.compact
    def __call__(self, *inputs: jax.Array) -> jax.Array:
        logits = pg.to_linen(self.config, name="pali")(*inputs)
        return linen.Dense(1, name="score")(logits[:, -1])


def scored_loss(module: Scored, params: Any) -> jax.Array:
    score = module.apply({"params": params}, *INPUTS)
    assert isinstance(score, jax.Array)
    return jnp.square(score).mean()


def test_as_a_part_of_a_module(tiny_config: pg.PaliGemmaConfig):
    module = Scored(tiny_config)
    params = jax.eval_shape(module.init, jax.random.key(0), *INPUTS)["params"]
    assert set(params) == {"pali", "score"}
    assert shapes_of(params["pali"]) == shapes_of(abstract_params(tiny_config))
    gradients = jax.eval_shape(jax.grad(lambda p: scored_loss(module, p)), params)
    assert shapes_of(gradients) == shapes_of(params)


@pytest.mark.slow
def test_random_weights_and_gradients(tiny_model: pg.PaliGemma):
    module = Scored(tiny_model.config)
    params = jax.jit(module.init)(jax.random.key(0), *INPUTS)["params"]
    drawn = flatten(params["pali"])
    assert all(np.isfinite(leaf).all() for leaf in drawn.values())
    for path in ("llm/embedder/input_embedding", "img/pos_embed", "img/blocks/attn/q/kernel"):
        assert drawn[path].std() > 0
    params = {**params, "pali": tiny_model.split()[1]}
    found = jax.jit(jax.grad(lambda p: scored_loss(module, p)))(params)

    def loss(params: Any, model: pg.PaliGemma) -> jax.Array:
        score = linen.Dense(1).apply({"params": params}, model(*INPUTS)[:, -1])
        assert isinstance(score, jax.Array)
        return jnp.square(score).mean()

    score, model = jax.jit(jax.grad(loss, (0, 1)))(params["score"], tiny_model)
    wanted = flatten({"pali": model.split()[1], "score": score})
    for path, leaf in flatten(found).items():
        np.testing.assert_allclose(leaf, wanted.pop(path), atol=1e-5, rtol=1e-4, err_msg=path)
    assert not wanted


def test_image_tokens_and_dtypes(tiny_model: pg.PaliGemma):
    module = pg.to_linen(tiny_model.config, dtype="bfloat16", param_dtype="bfloat16")
    variables = jax.eval_shape(module.init, jax.random.key(0), *INPUTS)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}
    params = {"params": tiny_model.split()[1]}
    tokens = jax.eval_shape(lambda p: module.apply(p, IMAGES, method="encode_images"), params)
    assert tokens.shape == (2, tiny_model.config.img.num_patches, tiny_model.config.llm.width)
    assert tokens.dtype == jnp.bfloat16


def test_parameters_that_do_not_fit(tiny_model: pg.PaliGemma):
    """No random weights in their place."""
    module = pg.to_linen(tiny_model.config)

    def apply(params: Any) -> Any:
        return jax.eval_shape(module.apply, {"params": params}, *INPUTS)

    flat = flatten(tiny_model.split()[1])
    with pytest.raises(ScopeCollectionNotFound):
        apply({})
    with pytest.raises(ScopeParamShapeError):
        apply(nest(flat | {"llm/final_norm/scale": jnp.zeros(1)}))
    kernel = flat.pop("img/head/kernel")
    with pytest.raises(ConfigError, match="missing     img/head/kernel"):
        apply(nest(flat))
    with pytest.raises(ConfigError, match="unexpected  img/head/weight"):
        apply(nest(flat | {"img/head/kernel": kernel, "img/head/weight": kernel}))
