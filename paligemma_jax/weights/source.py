"""What every checkpoint format offers the loader: a configuration and tensors, one at a time."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.weights.arrays import aligned_empty

Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all
Fill = Callable[[np.ndarray], None]  # copies a tensor into an array of any strides
LAYERED = ("img/blocks/", "llm/layers/")  # tensors whose first axis is the layer


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and stored dtype of one tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@runtime_checkable
class Source(Protocol):
    """An opened checkpoint whose names and shapes already fit `config`.

    `specs` maps the model's own paths ("llm/layers/attn/q_einsum/w") to shapes and dtypes. Nothing
    but headers has been read; weights are read layer by layer, so that the whole model is never in
    memory twice.
    """

    @property
    def kind(self) -> str:
        """ "big_vision", "huggingface" or "store"."""
        ...

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> PaliGemmaConfig: ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def layers(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        """What fills arrays of `dtype` with a tensor: with its layers in turn, or with all of it.

        Tensors without layers (see `LAYERED`) have one item. Each is called before the next one is
        asked for. Both may raise CheckpointError.
        """
        ...

    def close(self) -> None:
        """Releases open files."""
        ...


def read_tensor(source: Source, name: str, dtype: np.dtype) -> np.ndarray:
    """One tensor in C order, its layers stacked; raises CheckpointError."""
    result = aligned_empty(source.specs[name].shape, dtype)
    targets = result if name.startswith(LAYERED) else [result]
    for target, fill in zip(targets, source.layers(name, dtype), strict=True):
        fill(target)
    return result


def largest_first(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Names by falling size.

    Reading a tensor takes more memory than the tensor; that is best needed while little is loaded.
    """
    return sorted(specs, key=lambda name: -specs[name].nbytes)
