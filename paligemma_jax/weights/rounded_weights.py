"""Weights of few bits, made from floats piece by piece as they are read."""

import math
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.recipe import Mixed
from paligemma_jax.models.rounded_targets import RoundedTarget, rounded_targets
from paligemma_jax.weights.arrays import FLOATS, aligned_empty
from paligemma_jax.weights.source import (
    TABLES,
    Fill,
    TensorSpec,
    Weights,
    fill_from,
    piece_shapes,
    read_pieces,
)
from paligemma_jax.weights.tree import Shape, expected_shapes

Pair = tuple[np.ndarray, np.ndarray]  # values and scales of a piece


def few_bit_specs(config: PaliGemmaConfig, recipe: Mixed) -> dict[str, TensorSpec]:
    """The values and scales that a file of a model has by this recipe."""
    specs: dict[str, TensorSpec] = {}
    for rounded in rounded_targets(config, recipe):
        depth = rounded.target.depth
        lead = () if depth is None else (depth,)
        for path, found in zip((rounded.values, rounded.scale), rounded.file_shapes(), strict=True):
            specs[path] = TensorSpec((*lead, *found.shape), np.dtype(found.dtype))
    return specs


def float_shapes(config: PaliGemmaConfig, recipe: Mixed | None) -> dict[str, Shape]:
    """The tensors that stay floats, layers stacked."""
    shapes = expected_shapes(config)
    for rounded in rounded_targets(config, recipe) if recipe else ():
        for piece in rounded.target.pieces:
            del shapes[piece.path]
    return shapes


class RoundedWeights:
    """What becomes of floats by a recipe; see `Weights`.

    A piece of values is rounded when it is read, and its scales are kept until the next one is: so
    read them in turn (`families`). Weights are rounded in their own dtype, or in float32 where
    those that are joined to a matrix have several.
    """

    def __init__(self, weights: Weights, recipe: Mixed):
        self.config = weights.config
        self._weights = weights
        few_bits = few_bit_specs(self.config, recipe)
        floats = float_shapes(self.config, recipe)
        self.specs: Mapping[str, TensorSpec] = few_bits | {n: weights.specs[n] for n in floats}
        self._places: dict[str, tuple[RoundedTarget, int]] = {}
        for rounded in rounded_targets(self.config, recipe):
            self._places |= {rounded.values: (rounded, 0), rounded.scale: (rounded, 1)}
        self._last: tuple[str, int, Pair] | None = None

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        if name not in self._places:
            yield from self._weights.pieces(name, dtype)
            return
        rounded, which = self._places[name]
        made: Iterator[tuple[int, Pair]] | None = None
        for number in range(len(piece_shapes(name, self.specs[name].shape))):
            if which == 1 and self._last is not None and self._last[:2] == (rounded.owner, number):
                pair = self._last[2]
            else:
                made = made or enumerate(self._rounded(rounded))
                pair = next(pair for n, pair in made if n == number)
                self._last = (rounded.owner, number, pair)
            yield fill_from(pair[which])
        for _ in made or ():  # the digest of the last piece is compared after it
            pass

    def _rounded(self, rounded: RoundedTarget) -> Iterator[Pair]:
        target = rounded.target
        dtypes = {self._weights.specs[piece.path].dtype for piece in target.pieces}
        dtype = dtypes.pop() if len(dtypes) == 1 else FLOATS["float32"]
        parts = [self._weights.pieces(piece.path, dtype) for piece in target.pieces]
        first = target.pieces[0].path
        for shape, *fills in zip(
            piece_shapes(first, self._weights.specs[first].shape), *parts, strict=True
        ):
            array = aligned_empty(shape if target.depth is None else target.shape, dtype)
            for piece, fill in zip(target.pieces, fills, strict=True):
                fill(array if target.depth is None else piece.view(array))
            values, scale = rounded.round(jnp.asarray(array))
            yield np.asarray(values), np.asarray(scale)


class WidenedWeights:
    """Floats made of weights of few bits, as far as they are still known; see `Weights`."""

    def __init__(self, weights: Weights, recipe: Mixed, dtype: np.dtype):
        self.config = weights.config
        self._weights = weights
        shapes = expected_shapes(self.config)
        self._pieces = {
            piece.path: (rounded, number)
            for rounded in rounded_targets(self.config, recipe)
            for number, piece in enumerate(rounded.target.pieces)
        }
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(shape, dtype) if name in self._pieces else weights.specs[name]
            for name, shape in shapes.items()
        }

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        if name not in self._pieces:
            yield from self._weights.pieces(name, dtype)
            return
        rounded, number = self._pieces[name]
        piece, depth = rounded.target.pieces[number], rounded.target.depth
        for values, scale in read_pieces(self._weights, (rounded.values, rounded.scale)):
            shape = rounded.target.shape
            if name in TABLES:  # some rows at a time
                shape = (len(values), *shape[1:])
            array = np.asarray(rounded.widen(jnp.asarray(values), jnp.asarray(scale), shape))
            yield fill_from(array if depth is None else piece.view(array))


def weight_counts(config: PaliGemmaConfig, recipe: Mixed) -> dict[str, int]:
    """How many weights are in each format, by names such as "int4"; floats are left out."""
    counts: dict[str, int] = {}
    for rounded in rounded_targets(config, recipe):
        name = type(rounded.format).__name__.removesuffix("Dynamic").lower()
        size = math.prod(rounded.target.shape) * (rounded.target.depth or 1)
        counts[name] = counts.get(name, 0) + size
    return counts
