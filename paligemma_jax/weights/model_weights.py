"""A model in memory as `Weights`, whichever form its layers are in."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from paligemma_jax.models.abstract import to_params
from paligemma_jax.models.integers import as_in_files
from paligemma_jax.models.lora import merge_lora
from paligemma_jax.models.model_recipe import recipe_of
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.paths import flatten
from paligemma_jax.models.recipe import Mixed
from paligemma_jax.models.rounded_targets import RoundedTarget, rounded_targets
from paligemma_jax.models.unrolled import Piece, Target, is_unrolled, targets
from paligemma_jax.weights.array_weights import ArrayWeights, to_host
from paligemma_jax.weights.rounded_weights import few_bit_specs, float_shapes
from paligemma_jax.weights.source import SCALE, VALUES, Fill, TensorSpec, Weights, fill_from, split


def model_weights(model: PaliGemma) -> Weights:
    """The weights that a file of the model holds, adapters merged; rounded ones as they are.

    `recipe_of` tells what they are rounded by. Raises ConfigError for what cannot be in a file.
    """
    model = merge_lora(model)
    recipe = recipe_of(model)
    if is_unrolled(model):
        return UnrolledWeights(model, recipe)
    return ArrayWeights(model.config, flatten(to_params(model)))


class UnrolledWeights:
    """Of a model whose layers stand one by one, fused and in another order; see `Weights`."""

    def __init__(self, model: PaliGemma, recipe: Mixed | None = None):
        self.config = model.config
        self._params: dict[str, Any] = flatten(to_params(model))
        shapes = float_shapes(model.config, recipe)
        self._found: dict[str, tuple[Target, Piece]] = {
            piece.path: (target, piece)
            for target in targets(model.config)
            for piece in target.pieces
            if piece.path in shapes
        }
        self._whole = ArrayWeights(
            model.config,
            {
                path: self._params[path]
                for path, (target, _) in self._found.items()
                if target.depth is None
            },
        )
        self.specs = {
            path: TensorSpec(shapes[path], np.dtype(self._params[target.paths[0]].dtype))
            for path, (target, _) in self._found.items()
        }
        self._rounded: dict[str, RoundedTarget] = {}
        if recipe is not None:
            self.specs |= few_bit_specs(model.config, recipe)
            for rounded in rounded_targets(model.config, recipe):
                self._rounded |= {rounded.values: rounded, rounded.scale: rounded}

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        if name in self._rounded:
            yield from self._pieces_of_few_bits(name, self._rounded[name])
            return
        target, piece = self._found[name]
        if target.depth is None:
            yield from self._whole.pieces(name, dtype)
            return
        for path in target.paths:
            yield fill_from(piece.view(to_host(self._params[path])))

    def _pieces_of_few_bits(self, name: str, rounded: RoundedTarget) -> Iterator[Fill]:
        for owner in rounded.owners:
            values, scale = self._params[f"{owner}{VALUES}"], self._params[f"{owner}{SCALE}"]
            is_scale = name == rounded.scale
            found = to_host(scale if is_scale else as_in_files(values, scale.shape[1]))
            parts = [found] if rounded.target.depth is not None else split(name, found)
            yield from map(fill_from, parts)
