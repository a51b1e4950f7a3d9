"""What checkpoints, models and arrays all offer: a configuration, and tensors piece by piece."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.weights.arrays import aligned_empty, copy_into

Shape = tuple[int, ...]
Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all
Fill = Callable[[np.ndarray], None]  # copies a piece into an array of any strides, with a cast
LAYERED = ("img/blocks/", "llm/layers/")  # tensors whose first axis is the layer
VALUES, SCALE = "/matrix/values", "/matrix/scale"  # of a matrix of few bits
# A row for each token.
TABLES = (
    "llm/embedder/input_embedding",
    "llm/lm_head/w",
    *(f"llm/{name}{end}" for name in ("embedder", "lm_head") for end in (VALUES, SCALE)),
)
TABLE_ROWS = 8192  # of a piece; a part of the format of stores


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and stored dtype of one tensor, known without reading it."""

    shape: Shape
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@runtime_checkable
class Weights(Protocol):
    """A model's weights, wherever they are, to be read piece by piece.

    `specs` maps the model's own paths ("llm/layers/attn/q_einsum/w") to shapes and dtypes. A piece
    is a layer, a group of rows of a table of tokens, or a whole tensor that has neither; so the
    model is never in memory twice, nor, while it is written, once.
    """

    @property
    def config(self) -> PaliGemmaConfig: ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        """What fills arrays of `dtype` with the pieces of a tensor in turn; see `piece_shapes`.

        Each is called before the next one is asked for. Both may raise CheckpointError.
        """
        ...


@runtime_checkable
class Source(Weights, Protocol):
    """An opened checkpoint whose names and shapes already fit `config`.

    Nothing but headers has been read.
    """

    @property
    def kind(self) -> str:
        """ "big_vision", "huggingface" or "store"."""
        ...

    @property
    def path(self) -> Path: ...

    def close(self) -> None:
        """Releases open files."""
        ...


def fill_from(source: np.ndarray) -> Fill:
    """What fills arrays with one that is at hand."""
    return functools.partial(_copy, source)


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    copy_into(target, source)


def is_split(name: str) -> bool:
    """Whether a tensor has pieces."""
    return name.startswith(LAYERED) or name in TABLES


def piece_places(name: str, shape: Shape) -> list[Any]:
    """Where each piece of a tensor is on its first axis: a number, a slice, or `...` for all."""
    if name.startswith(LAYERED):
        return list(range(shape[0]))
    if name in TABLES:
        starts = range(0, shape[0], TABLE_ROWS)
        return [slice(start, min(start + TABLE_ROWS, shape[0])) for start in starts]
    return [...]


def piece_shapes(name: str, shape: Shape) -> list[Shape]:
    """The shape of each piece of a tensor, which has no axis of layers."""
    return [
        shape[1:]
        if isinstance(place, int)
        else (place.stop - place.start, *shape[1:])
        if isinstance(place, slice)
        else shape
        for place in piece_places(name, shape)
    ]


def split(name: str, whole: np.ndarray) -> list[np.ndarray]:
    """Views of a tensor's pieces."""
    return [whole[place] for place in piece_places(name, whole.shape)]


def read_tensor(weights: Weights, name: str, dtype: np.dtype) -> np.ndarray:
    """One tensor in C order, its pieces together; raises CheckpointError."""
    result = aligned_empty(weights.specs[name].shape, dtype)
    for target, fill in zip(split(name, result), weights.pieces(name, dtype), strict=True):
        fill(target)
    return result


def read_pieces(weights: Weights, names: Sequence[str]) -> Iterator[list[np.ndarray]]:
    """The pieces of tensors that have equally many, in turn and as they are stored.

    Raises CheckpointError.
    """
    specs = [weights.specs[name] for name in names]
    shapes = [piece_shapes(name, spec.shape) for name, spec in zip(names, specs, strict=True)]
    fills = [weights.pieces(name, spec.dtype) for name, spec in zip(names, specs, strict=True)]
    for together in zip(*shapes, strict=True):
        arrays = []
        for shape, spec, of_tensor in zip(together, specs, fills, strict=True):
            arrays.append(aligned_empty(shape, spec.dtype))
            next(of_tensor)(arrays[-1])
        yield arrays
        del arrays  # or they would stay while the next ones are read
    for of_tensor in fills:
        if next(of_tensor, None) is not None:  # a digest is compared after the last piece
            raise ValueError(f"{names} have more pieces than their shapes tell")


def read_together(weights: Weights, names: Sequence[str]) -> list[np.ndarray]:
    """Tensors whose pieces are read in turn; see `read_pieces`."""
    specs = [weights.specs[name] for name in names]
    whole = [aligned_empty(spec.shape, spec.dtype) for spec in specs]
    places = (piece_places(name, spec.shape) for name, spec in zip(names, specs, strict=True))
    for at, arrays in zip(zip(*places, strict=True), read_pieces(weights, names), strict=True):
        for target, place, array in zip(whole, at, arrays, strict=True):
            target[place] = array
    return whole


def families(specs: Mapping[str, TensorSpec]) -> list[tuple[str, ...]]:
    """Names, the largest first, with those together that are made together: values and scales."""
    found = []
    for name in largest_first(specs):
        if name.endswith(VALUES):
            found.append((name, name.removesuffix(VALUES) + SCALE))
        elif not name.endswith(SCALE):
            found.append((name,))
    return found


def largest_first(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Names by falling size.

    Reading a tensor takes more memory than the tensor; that is best needed while little is loaded.
    """
    return sorted(specs, key=lambda name: -specs[name].nbytes)
