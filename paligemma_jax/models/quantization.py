"""Models whose weights are of few bits: `quantize`."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.calibration import InputMoments, weight_paths
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantized_layers import quantize_layer
from paligemma_jax.models.recipe import Format, Recipe, find_recipe
from paligemma_jax.models.unrolled import unroll


def quantize(
    model: PaliGemma, recipe: Recipe | str, *, inputs: InputMoments | None = None
) -> PaliGemma:
    """The model with weights of few bits, in the layout for inference; `model` stays as it is.

    `recipe` is an `Int8`, `Int8Dynamic`, `Int4` or `Mixed`, or the name of one: "int8", "int4".
    Activations, norms and what the recipe leaves alone keep their dtypes, and their arrays are
    shared. `quantize_in_place` needs less memory, and `from_pretrained(..., quantize=)` least.
    With `inputs` (see `measure_inputs`) weights of 4 bits lose about half as much of what the model
    says. Raises ConfigError for a model that is quantized already.
    """
    shared = nnx.merge(*nnx.split(unroll(model)))
    quantize_in_place(shared, recipe, inputs=inputs)
    return shared


def quantize_in_place(
    model: PaliGemma, recipe: Recipe | str, *, inputs: InputMoments | None = None
) -> None:
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
    for number, block in enumerate(text):
        for path, (owner, name) in weight_paths(number).items():
            format = formats.attention if owner == "attn" else formats.mlp
            _replace(getattr(block, owner), (name,), format, (inputs or {}).get(path))
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


def _replace(
    owner: object,
    names: tuple[str, ...],
    format: Format | None,
    moments: jax.Array | None = None,
) -> None:
    for name in names:
        if format is not None and hasattr(owner, name):
            layer = _quantize(getattr(owner, name), format, moments)
            setattr(owner, name, jax.block_until_ready(layer))


@functools.partial(jax.jit, static_argnames="format")
def _quantize(layer: nnx.Module, format: Format, moments: jax.Array | None) -> nnx.Module:
    return quantize_layer(layer, format, moments)
