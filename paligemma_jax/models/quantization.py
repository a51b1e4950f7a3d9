"""Models whose weights are of few bits: `quantize`."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantized_layers import quantize_layer
from paligemma_jax.models.recipe import Format, Recipe, find_recipe
from paligemma_jax.models.unrolled import unroll


def quantize(model: PaliGemma, recipe: Recipe | str) -> PaliGemma:
    """The model with weights of few bits, in the layout for inference; `model` stays as it is.

    `recipe` is an `Int8`, `Int8Dynamic`, `Int4` or `Mixed`, or the name of one: "int8", "int4".
    Activations, norms and what the recipe leaves alone keep their dtypes, and their arrays are
    shared. `quantize_in_place` needs less memory, and `from_pretrained(..., quantize=)` least.
    Raises ConfigError for a model that is quantized already.
    """
    shared = nnx.merge(*nnx.split(unroll(model)))
    quantize_in_place(shared, recipe)
    return shared


def quantize_in_place(model: PaliGemma, recipe: Recipe | str) -> None:
    """`quantize` of an unrolled model (see `unroll`), one weight after the other.

    At most one more weight is held at a time, if nothing else refers to those of the model. Raises
    ConfigError for one that is stacked or quantized.
    """
    if is_quantized(model):
        raise ConfigError(
            "The weights of this model are rounded to integers already, and rounding them again "
            "would lose more. A model as it was trained fits. Load it once more without quantize=."
        )
    text, image = model.llm.layers, model.img.blocks
    if not (isinstance(text, nnx.List) and isinstance(image, nnx.List)):
        raise ConfigError(
            "The layers of this model are stacked, as training wants them. Layers one by one fit. "
            "Call quantize_in_place(unroll(model), recipe), or quantize(model, recipe)."
        )
    formats = find_recipe(recipe)
    for block in text:
        _replace(block.attn, ("qkv", "out"), formats.attention)
        _replace(block.mlp, ("gate_up", "down"), formats.mlp)
    _replace(model.llm, ("embedder", "lm_head"), formats.table)
    for block in image:
        _replace(block.attn, ("q", "k", "v", "out"), formats.image)
        _replace(block.mlp, ("fc1", "fc2"), formats.image)
    _replace(model.img, ("head",), formats.image)


def abstract_quantized(model: PaliGemma, recipe: Recipe | str) -> PaliGemma:
    """The quantized model with shapes in place of arrays, from an unrolled one of shapes."""

    def run(model: PaliGemma) -> PaliGemma:
        quantize_in_place(model, recipe)
        return model

    return jax.eval_shape(run, model)


def is_quantized(model: nnx.Module) -> bool:
    """Whether any weight is an integer."""
    return any(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(model))


def _replace(owner: object, names: tuple[str, ...], format: Format | None) -> None:
    for name in names:
        if format is not None and hasattr(owner, name):
            setattr(owner, name, jax.block_until_ready(_quantize(getattr(owner, name), format)))


@functools.partial(jax.jit, static_argnames="format")
def _quantize(layer: nnx.Module, format: Format) -> nnx.Module:
    return quantize_layer(layer, format)
