"""Rounding an unrolled model's parameters to few bits as they come, one at a time."""

import functools
import math
from collections.abc import Iterable, Iterator

import jax

from paligemma_jax.models.quantized_layers import kernel_matrix
from paligemma_jax.models.recipe import Format, Mixed, Recipe, find_recipe

_TWO_INPUT_AXES = ("attn/out/w", "attn/out/kernel")  # heads and their width


def quantize_arrays(
    arrays: Iterable[tuple[str, jax.Array]], recipe: Recipe | str
) -> Iterator[tuple[str, jax.Array]]:
    """Paths and arrays of the model that `quantize` makes, from those of the unrolled one."""
    formats = find_recipe(recipe)
    for path, array in arrays:
        format = _find_format(formats, path)
        if format is None:
            yield path, array
            continue
        owner, _, name = path.rpartition("/")
        axes = 2 if path.endswith(_TWO_INPUT_AXES) else 1
        values, scale = jax.block_until_ready(_store(array, axes, name == "kernel", format))
        del array  # or it would stay while the next one is read
        yield f"{owner}/matrix/values", values
        yield f"{owner}/matrix/scale", scale


def _find_format(formats: Mixed, path: str) -> Format | None:
    match path.split("/"):
        case ["llm", "layers", _, "attn", *_]:
            return formats.attention
        case ["llm", "layers", _, "mlp", *_]:
            return formats.mlp
        case ["llm", "embedder" | "lm_head", _]:
            return formats.table
        case ["img", "blocks", *_, "kernel"] | ["img", "head", "kernel"]:
            return formats.image
    return None


@functools.partial(jax.jit, static_argnames=("axes", "is_kernel", "format"))
def _store(w: jax.Array, axes: int, is_kernel: bool, format: Format) -> tuple[jax.Array, jax.Array]:
    """Integers and scales; `axes` of `w` are contracted, a kernel's first and others' last."""
    if is_kernel:
        matrix = format.store(kernel_matrix(w, axes))
    else:
        matrix = format.store(w.reshape(-1, math.prod(w.shape[w.ndim - axes :])))
    return matrix.values[...], matrix.scale[...]
