"""What every checkpoint format offers the loader: a configuration and tensors, one at a time."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from paligemma_jax.config import PaliGemmaConfig

Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all


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
    but headers has been read; `read` reads one tensor, so the whole model is never in memory twice.
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

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        """One tensor in the model's layout, stored dtype unless asked; raises CheckpointError."""
        ...

    def close(self) -> None:
        """Releases open files."""
        ...


def largest_first(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Names by falling size.

    Reading a tensor takes more memory than the tensor; that is best needed while little is loaded.
    """
    return sorted(specs, key=lambda name: -specs[name].nbytes)
