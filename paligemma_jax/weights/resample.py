"""Position embeddings for another resolution."""

import math

import numpy as np

from paligemma_jax.errors import CheckpointError


def resample_position_embeddings(embeddings: np.ndarray, patches: int) -> np.ndarray:
    """[1, P, D] -> [1, patches, D], bilinear between the corners of the square grids.

    Equals big_vision's resampling (models/vit.py: scipy.ndimage.zoom of order 1), computed in
    float64, except that scipy gives zeros in the last row and column of some sizes (e.g. 32 to 16),
    where its coordinate is rounded to beyond the edge. dtype stays, and an equal size gives the
    very array. Raises CheckpointError if a grid is no square.
    """
    old, new = math.isqrt(embeddings.shape[1]), math.isqrt(patches)
    if old**2 != embeddings.shape[1] or new**2 != patches:
        raise CheckpointError(
            f"{embeddings.shape[1]} position embeddings cannot become {patches}. Square numbers "
            "fit. Choose a resolution such as 224, 448 or 896."
        )
    if old == new:
        return embeddings
    grid = embeddings[0].astype(np.float64).reshape(old, old, -1)
    weights = _bilinear_weights(old, new)
    resampled = np.einsum("io,jp,opd->ijd", weights, weights, grid, optimize=True)
    return resampled.reshape(1, patches, -1).astype(embeddings.dtype)


def _bilinear_weights(old: int, new: int) -> np.ndarray:
    """f64[new, old]: row i mixes the two old positions around i * (old - 1) / (new - 1)."""
    position = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    return np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(old)))
