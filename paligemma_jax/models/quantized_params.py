"""From the parameters of a stacked model to an unrolled one of few bits, without ever holding both.

Each layer's weight is rounded by itself as soon as its stacked parameter is there, which can then
be let go.
"""

import functools
import math

import jax
import jax.numpy as jnp

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.layers import DType
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization import abstract_quantized
from paligemma_jax.models.quantized_layers import kernel_matrix
from paligemma_jax.models.recipe import Format, Mixed, Recipe, find_recipe
from paligemma_jax.models.unrolled import (
    Piece,
    UnrolledParams,
    abstract_unrolled,
    fill,
    find_piece,
)

Stored = tuple[jax.Array, jax.Array]  # integers and scales
_TWO_INPUT_AXES = ("attn/out/w", "attn/out/kernel")  # heads and their width


class QuantizedParams:
    """As `UnrolledParams`, for the model that `quantize` makes."""

    def __init__(self, config: PaliGemmaConfig, recipe: Recipe | str):
        self._config = config
        self._formats = find_recipe(recipe)
        self._others = UnrolledParams(config)
        self._arrays: dict[str, jax.Array] = {}
        self._waiting: dict[str, dict[int, list[Stored]]] = {}

    def add(self, path: str, array: jax.Array) -> None:
        """Takes the parameter `path` of the stacked form, e.g. "llm/layers/mlp/linear/w"."""
        format = _find_format(self._formats, path)
        if format is None:
            self._others.add(path, array)
            return
        prefix, piece = find_piece(path)
        if prefix is None:
            self._put(path, _store(array, None, piece, format))
            return
        layers = [_store(array, number, piece, format) for number in range(len(array))]
        if piece.part is not None:
            parts = self._waiting.setdefault(piece.target, {})
            parts[piece.part] = layers
            if len(parts) < 2:
                return
            layers = list(map(_join, parts.pop(0), parts.pop(1)))
        for number, layer in enumerate(layers):
            self._put(f"{prefix}{number}/{piece.target}", layer)

    def model(self, dtype: DType) -> PaliGemma:
        """The model around what was added, which must be all; `dtype` is of its activations."""

        shapes = abstract_quantized(abstract_unrolled(self._config, dtype), self._formats)
        return fill(shapes, self._others.arrays | self._arrays)

    def _put(self, path: str, stored: Stored) -> None:
        owner = path.rpartition("/")[0]
        values, scale = jax.block_until_ready(stored)
        self._arrays |= {f"{owner}/matrix/values": values, f"{owner}/matrix/scale": scale}


def _find_format(formats: Mixed, path: str) -> Format | None:
    match path.split("/"):
        case ["llm", "layers", "attn", *_]:
            return formats.attention
        case ["llm", "layers", "mlp", *_]:
            return formats.mlp
        case ["llm", "embedder" | "lm_head", _]:
            return formats.table
        case ["img", "blocks", *_, "kernel"] | ["img", "head", "kernel"]:
            return formats.image
    return None


@functools.partial(jax.jit, static_argnames=("piece", "format"))
def _store(array: jax.Array, number: jax.Array | None, piece: Piece, format: Format) -> Stored:
    w = array if number is None else piece.move(array[number])
    axes = 2 if piece.target in _TWO_INPUT_AXES else 1
    if piece.target.endswith("kernel"):
        matrix = format.store(kernel_matrix(w, axes))
    else:
        matrix = format.store(w.reshape(-1, math.prod(w.shape[w.ndim - axes :])))
    return matrix.values[...], matrix.scale[...]


@jax.jit
def _join(first: Stored, second: Stored) -> Stored:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
