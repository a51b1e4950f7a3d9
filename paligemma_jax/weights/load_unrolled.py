"""Loading a checkpoint as a model for inference, layer by layer and each array where it stays."""

import math
from collections.abc import Iterator

import jax
import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization import abstract_quantized
from paligemma_jax.models.quantized_params import quantize_arrays
from paligemma_jax.models.recipe import Recipe
from paligemma_jax.models.unrolled import Target, abstract_unrolled, fill, targets
from paligemma_jax.weights.arrays import DTypeLike, aligned_empty, as_float_dtype
from paligemma_jax.weights.checkpoint import Checkpoint
from paligemma_jax.weights.load import POSITIONS
from paligemma_jax.weights.resample import resample_position_embeddings
from paligemma_jax.weights.source import Progress


def load_unrolled(
    checkpoint: Checkpoint,
    config: PaliGemmaConfig,
    dtype: DTypeLike,
    *,
    recipe: Recipe | str | None = None,
    progress: Progress | None = None,
) -> PaliGemma:
    """The model with its layers one by one, its weights and activations of `dtype`.

    `config` may have another resolution than the checkpoint's; position embeddings are resampled
    then. A `recipe` rounds weights to integers one by one. Peak memory is that of the model and
    of one layer's largest parameter. Raises CheckpointError, and ConfigError for an unknown recipe.
    """
    model = abstract_unrolled(config, dtype)
    arrays = _arrays(checkpoint, config, as_float_dtype(dtype), progress)
    if recipe is not None:
        model = abstract_quantized(model, recipe)
        arrays = quantize_arrays(arrays, recipe)
    return fill(model, dict(arrays))


def _arrays(
    checkpoint: Checkpoint,
    config: PaliGemmaConfig,
    dtype: np.dtype,
    progress: Progress | None,
) -> Iterator[tuple[str, jax.Array]]:
    """Every parameter of the unrolled form by its path, read when asked for, the largest first.

    Each is written where it stays, layer by layer: no stacked parameter is ever in memory.
    """
    done = 0
    for target in sorted(targets(config), key=lambda t: -math.prod(t.shape) * (t.depth or 1)):
        paths = [piece.path for piece in target.pieces]
        if progress:
            progress(paths[0], done, checkpoint.nbytes)
        if paths == [POSITIONS]:
            array = checkpoint.read(POSITIONS, dtype)
            array = resample_position_embeddings(array, config.img.num_patches)
            yield POSITIONS, jax.device_put(array)
        else:
            yield from _layers_of(checkpoint, target, dtype)
        done += sum(checkpoint.specs[path].nbytes for path in paths)
    if progress:
        progress("", done, checkpoint.nbytes)


def _layers_of(
    checkpoint: Checkpoint, target: Target, dtype: np.dtype
) -> Iterator[tuple[str, jax.Array]]:
    if target.depth is None:
        (path,) = target.paths
        yield path, jax.device_put(checkpoint.read(path, dtype))
        return
    layers = zip(*(checkpoint.pieces(piece.path, dtype) for piece in target.pieces), strict=True)
    for path, fills in zip(target.paths, layers, strict=True):
        array = aligned_empty(target.shape, dtype)
        for piece, copy in zip(target.pieces, fills, strict=True):
            copy(piece.view(array))
        yield path, jax.device_put(array)
