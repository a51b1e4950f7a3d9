"""Models whose weights are of few bits: `quantize`."""

import functools
from collections.abc import Callable, Iterable

import jax
from flax import nnx

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.calibration import (
    InputMoments,
    Texts,
    measure_inputs,
    moment_bytes,
    weight_paths,
)
from paligemma_jax.models.formats import Format, Int4
from paligemma_jax.models.integers import is_rounded
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantized_layers import quantize_layer
from paligemma_jax.models.recipe import Mixed, Recipe, find_recipe, spell_recipe
from paligemma_jax.models.unrolled import is_unrolled, unroll

CALIBRATION_BYTES = 4 << 30  # of what a decoder layer's weights are multiplied with, at once


def quantize(
    model: PaliGemma, recipe: Recipe | str, *, inputs: InputMoments | None = None
) -> PaliGemma:
    """The model with weights of few bits, in the layout for inference; `model` stays as it is.

    `recipe` is an `Int8`, `Int8Dynamic`, `Int4`, `Float8` or `Mixed`, or what `find_recipe` reads:
    "int8", "int4", "float8", "mixed", "mlp=int4:128,table=int8".
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
    formats = _checked(model, recipe)
    for number in range(model.config.llm.depth):
        _quantize_block(model, number, formats, inputs or {})
    _quantize_rest(model, formats)


def calibrate_in_place(
    model: PaliGemma,
    recipe: Recipe | str,
    texts: Callable[[], Iterable[Texts]],
    *,
    memory: int = CALIBRATION_BYTES,
) -> None:
    """`quantize_in_place` by what weights of 4 bits are multiplied with in some texts.

    `texts()` is called once for each of the `calibration_rounds`: some layers at a time, of which
    the measures take at most `memory` bytes, each group after those before it were rounded. Raises
    ConfigError as `quantize_in_place`, and for a recipe without weights of 4 bits in the decoder.
    """
    formats = _checked(model, recipe)
    if not any(isinstance(format, Int4) for format in (formats.attention, formats.mlp)):
        raise ConfigError(
            f"Nothing of {spell_recipe(formats)} is rounded by what it is multiplied with. Weights "
            "of 4 bits of the decoder's layers are. Calibrate with: recipe='int4' (--recipe int4)"
        )
    for layers in calibration_rounds(model.config, memory):
        inputs = measure_inputs(model, texts(), layers=layers)
        for number in layers:
            _quantize_block(model, number, formats, inputs)
    _quantize_rest(model, formats)


def calibration_rounds(config: PaliGemmaConfig, memory: int = CALIBRATION_BYTES) -> list[range]:
    """The layers that `calibrate_in_place` measures together."""
    depth, size = config.llm.depth, max(1, memory // moment_bytes(config.llm))
    return [range(start, min(start + size, depth)) for start in range(0, depth, size)]


def _checked(model: PaliGemma, recipe: Recipe | str) -> Mixed:
    """The recipe, if the model is one that can be quantized."""
    if is_quantized(model):
        raise ConfigError(
            "The weights of this model are rounded to few bits already, and rounding them again "
            "would lose more. A model as it was trained fits. Load it once more without quantize=."
        )
    if not is_unrolled(model):
        raise ConfigError(
            "The layers of this model are stacked, as training wants them. Layers one by one fit. "
            "Call quantize_in_place(unroll(model), recipe), or quantize(model, recipe)."
        )
    return find_recipe(recipe)


def _quantize_block(model: PaliGemma, number: int, formats: Mixed, inputs: InputMoments) -> None:
    text = model.llm.layers
    assert isinstance(text, nnx.List)
    for path, (owner, name) in weight_paths(number).items():
        format = formats.attention if owner == "attn" else formats.mlp
        _replace(getattr(text[number], owner), (name,), format, inputs.get(path))


def _quantize_rest(model: PaliGemma, formats: Mixed) -> None:
    image = model.img.blocks
    assert isinstance(image, nnx.List)
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
    """Whether any weight is of at most 8 bits."""
    return any(map(is_rounded, jax.tree.leaves(model)))


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
