"""A model in memory as `Weights`, whichever form its layers are in."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from paligemma_jax.models.abstract import to_params
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.paths import flatten
from paligemma_jax.models.unrolled import Piece, Target, is_unrolled, plain, targets
from paligemma_jax.weights.array_weights import ArrayWeights, to_host
from paligemma_jax.weights.source import Fill, TensorSpec, Weights, fill_from
from paligemma_jax.weights.tree import expected_shapes


def model_weights(model: PaliGemma) -> Weights:
    """The weights that a file of the model holds, adapters merged.

    Raises ConfigError for weights that are rounded to integers.
    """
    model = plain(model)
    if is_unrolled(model):
        return UnrolledWeights(model)
    return ArrayWeights(model.config, flatten(to_params(model)))


class UnrolledWeights:
    """Of a model whose layers stand one by one, fused and in another order; see `Weights`."""

    def __init__(self, model: PaliGemma):
        self.config = model.config
        self._params: dict[str, Any] = flatten(to_params(model))
        self._found: dict[str, tuple[Target, Piece]] = {
            piece.path: (target, piece)
            for target in targets(model.config)
            for piece in target.pieces
        }
        self._whole = ArrayWeights(
            model.config,
            {
                path: self._params[path]
                for path, (target, _) in self._found.items()
                if target.depth is None
            },
        )
        shapes = expected_shapes(model.config)
        self.specs = {
            path: TensorSpec(shapes[path], np.dtype(self._params[target.paths[0]].dtype))
            for path, (target, _) in self._found.items()
        }

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        target, piece = self._found[name]
        if target.depth is None:
            yield from self._whole.pieces(name, dtype)
            return
        for path in target.paths:
            yield fill_from(piece.view(to_host(self._params[path])))
