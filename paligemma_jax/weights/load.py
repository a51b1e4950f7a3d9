"""Loading a checkpoint's parameters, leaf by leaf."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.weights.arrays import DTypeLike
from paligemma_jax.weights.changed_weights import POSITIONS as POSITIONS
from paligemma_jax.weights.checkpoint import Checkpoint, open_checkpoint
from paligemma_jax.weights.resample import resample_position_embeddings
from paligemma_jax.weights.source import Progress
from paligemma_jax.weights.tree import nest


def load_params(
    path: str | os.PathLike[str],
    config: PaliGemmaConfig | None = None,
    dtype: DTypeLike = None,
    *,
    resolution: int | None = None,
    progress: Progress | None = None,
    verify: bool = True,
) -> tuple[PaliGemmaConfig, dict[str, Any]]:
    """The configuration and the parameters (nested dict of arrays) of a checkpoint.

    `dtype` casts every leaf; the stored dtypes stay otherwise. `resolution` (pixels) resamples the
    position embeddings. Arrays are on the default device, on a CPU without a copy; for several
    devices see `load_on_mesh`. Peak memory is the parameters plus about one array. Raises
    CheckpointError.
    """
    with open_checkpoint(path, config=config, verify=verify) as checkpoint:
        return load_from(checkpoint, dtype, resolution=resolution, progress=progress)


def load_from(
    checkpoint: Checkpoint,
    dtype: DTypeLike = None,
    *,
    resolution: int | None = None,
    progress: Progress | None = None,
) -> tuple[PaliGemmaConfig, dict[str, Any]]:
    """`load_params` of an opened checkpoint."""
    checkpoint.require_floats()
    config = with_resolution(checkpoint.config, resolution)
    leaves = load_leaves(checkpoint, config, dtype, progress=progress)
    return config, nest(dict(leaves))


def with_resolution(config: PaliGemmaConfig, resolution: int | None) -> PaliGemmaConfig:
    """The configuration for pictures of `resolution` pixels a side; None leaves it alone."""
    if resolution is None or resolution == config.img.image_size:
        return config
    return dataclasses.replace(config, img=dataclasses.replace(config.img, image_size=resolution))


def load_leaves(
    checkpoint: Checkpoint,
    config: PaliGemmaConfig,
    dtype: DTypeLike = None,
    *,
    progress: Progress | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """Every parameter by its path, read when asked for, the largest first."""
    for name, array in checkpoint.tensors(dtype, progress):
        if name == POSITIONS:
            array = resample_position_embeddings(array, config.img.num_patches)
        yield name, jax.device_put(array)
