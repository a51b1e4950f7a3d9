"""Tensors of checkpoints and models: names, shapes, dtypes, and reading them chunk by chunk.

Names are the model's parameter paths, e.g. "llm/layers/attn/q_einsum/w", layers stacked on the
first axis. A chunk is one layer of a stacked tensor, a group of rows of an embedding table, or the
whole of any other tensor; no more than a chunk need be in memory beside what is being made.
"""

import abc
import dataclasses
import difflib
import functools
import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from paligemma_jax.config import GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.errors import CheckpointError, ConfigError, problem_list
from paligemma_jax.models.paligemma import abstract_params, flatten

DTypeLike = Any  # a name such as "bfloat16", a numpy or a JAX dtype
Shape = tuple[int, ...]
Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}
# What native checkpoints may hold: floats and quantized values.
STORED_DTYPES = {**FLOATS, **{d.name: d for d in map(np.dtype, (np.int8, ml_dtypes.float8_e4m3fn))}}

LAYER_STACKS = ("img/blocks/", "llm/layers/")  # tensors whose first axis is the layer
VALUES, SCALE = "/matrix/values", "/matrix/scale"  # ends of the names of a quantized matrix
EMBEDDING_TABLES = (
    "llm/embedder/input_embedding",
    "llm/lm_head/w",
    *(f"llm/{name}{end}" for name in ("embedder", "lm_head") for end in (VALUES, SCALE)),
)
CHUNK_ROWS = 8192  # of an embedding table; a part of the native format

_ALIGNMENT = 64  # bytes; jax.device_put on CPU aliases arrays that start at a multiple of it
_STRIP = 32  # columns; a strip of both sides of a transposition stays in the cache (5x faster)


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


class TensorSource(abc.ABC):
    """Where a model's weights are read from: a checkpoint, a model in memory, a view of either.

    Attributes:
      config: the architecture that the tensors match.
      specs: shape and dtype of every tensor by its name.
    """

    config: PaliGemmaConfig
    specs: Mapping[str, TensorSpec]

    @abc.abstractmethod
    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        """Fills `out`, an array of any strides and float dtype, with one chunk of a tensor.

        Chunks of one tensor are read fastest in order. Raises CheckpointError.
        """

    def read_slice(
        self, name: str, index: int, part: tuple[slice, ...], dtype: np.dtype
    ) -> np.ndarray:
        """A slice of one chunk; sources that can read parts of a file read no more than that."""
        chunk = aligned_empty(chunk_shapes(name, self.specs[name].shape)[index], dtype)
        self.read_chunk(name, index, chunk)
        return chunk[part]

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """One tensor in aligned C order, cast to `dtype`; raises CheckpointError."""
        whole = aligned_empty(self.specs[name].shape, dtype)
        for index, place in enumerate(chunk_places(name, whole.shape)):
            self.read_chunk(name, index, whole[place])
        return whole

    @property
    def nbytes(self) -> int:
        """Size of all tensors as stored."""
        return sum(spec.nbytes for spec in self.specs.values())


def chunk_places(name: str, shape: Shape) -> list[Any]:
    """Where each chunk is on the first axis: a layer's number, a slice, or `...` for the whole."""
    if name.startswith(LAYER_STACKS):
        return list(range(shape[0]))
    if name in EMBEDDING_TABLES:
        starts = range(0, shape[0], CHUNK_ROWS)
        return [slice(start, min(start + CHUNK_ROWS, shape[0])) for start in starts]
    return [...]


def chunk_shapes(name: str, shape: Shape) -> list[Shape]:
    """The shape of each chunk of a tensor, without an axis of layers."""
    return [
        shape[1:]
        if isinstance(place, int)
        else (place.stop - place.start, *shape[1:])
        if isinstance(place, slice)
        else shape
        for place in chunk_places(name, shape)
    ]


def read_chunks(source: TensorSource, names: Sequence[str]) -> Iterator[list[np.ndarray]]:
    """The chunks of tensors that have equally many, in turn, in their stored dtypes."""
    specs = [source.specs[name] for name in names]
    shapes = (chunk_shapes(name, spec.shape) for name, spec in zip(names, specs, strict=True))
    for index, chunk in enumerate(zip(*shapes, strict=True)):
        arrays = [
            aligned_empty(shape, spec.dtype) for shape, spec in zip(chunk, specs, strict=True)
        ]
        for name, array in zip(names, arrays, strict=True):
            source.read_chunk(name, index, array)
        yield arrays
        del arrays  # or they would stay in memory while the next ones are read


def tensor_groups(specs: Mapping[str, TensorSpec]) -> list[tuple[str, ...]]:
    """Names, largest first; values and scales of a quantized matrix, made together, are a group."""
    return [
        (name, name.removesuffix(VALUES) + SCALE) if name.endswith(VALUES) else (name,)
        for name in largest_first(specs)
        if not name.endswith(SCALE) or name.removesuffix(SCALE) + VALUES not in specs
    ]


def largest_first(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Names by falling size, so that what reading takes is needed while little is loaded."""
    return sorted(specs, key=lambda name: -specs[name].nbytes)


def expected_shapes(config: PaliGemmaConfig) -> Mapping[str, Shape]:
    """Path and shape of every parameter of a model, layers stacked on a leading axis."""
    return _expected_shapes(config.img, config.llm)


@functools.lru_cache(32)
def _expected_shapes(img: SigLIPConfig, llm: GemmaConfig) -> Mapping[str, Shape]:
    params = flatten(abstract_params(PaliGemmaConfig(img=img, llm=llm)))
    return {path: tuple(leaf.shape) for path, leaf in params.items()}


def shape_problems(
    found: Mapping[str, Shape | None], expected: Mapping[str, Shape | None]
) -> list[str]:
    """One line for each missing, unexpected or misshaped tensor; None stands for any shape."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    lines = [
        f"missing     {name}{_spell(expected[name])}{_similar(name, unexpected)}"
        for name in missing
    ]
    lines += [f"unexpected  {name}{_spell(found[name])}" for name in unexpected]
    for name, shape in expected.items():
        actual = found.get(name)
        if actual is not None and shape is not None and tuple(actual) != tuple(shape):
            lines.append(f"shape       {name}: checkpoint {actual}, model {shape}")
    return lines


def _spell(shape: Shape | None) -> str:
    return "" if shape is None else f" {shape}"


def _similar(name: str, candidates: Sequence[str]) -> str:
    # A renamed tensor is the usual cause of one missing and one unexpected; long lists are another
    # architecture, where resemblance says nothing and comparing all pairs takes long.
    few = candidates if len(candidates) <= 50 else ()
    close = difflib.get_close_matches(name, few, n=1, cutoff=0.8)
    return f" (is it {close[0]}?)" if close else ""


def validation_error(path: str | os.PathLike[str], problems: Sequence[str]) -> CheckpointError:
    """The error for a checkpoint whose tensors do not match the model, naming up to twenty."""
    return CheckpointError(
        f"Checkpoint {os.fspath(path)} does not match the model {problem_list(problems)}\n"
        "Expected exactly the tensors of a PaliGemma or PaliGemma 2 configuration. See what the "
        f"checkpoint holds: paligemma info {shlex.quote(os.fspath(path))}"
    )


def as_float_dtype(dtype: DTypeLike) -> np.dtype:
    """A dtype that parameters can be loaded in; ConfigError for any other."""
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in ("float32", "float16", "bfloat16"):
        raise ConfigError(
            f"Parameters of dtype {name} cannot be loaded: expected float32, bfloat16 or float16. "
            'Pass for example dtype="bfloat16"'
        )
    return FLOATS[name]


def aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Uninitialized C-order array whose data starts at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def as_bytes(array: np.ndarray) -> memoryview:
    """The memory of a C-order array."""
    return array.reshape(-1).view(np.uint8).data


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source for equal shapes, with a cast where dtypes differ.

    Transposed sources are copied strip by strip: numpy alone walks one side against the cache.
    """
    if source.dtype != target.dtype:
        source = np.asarray(source).astype(target.dtype)
    raw = np.dtype(f"u{target.itemsize}")  # numpy copies unsigned integers faster than bfloat16
    source, target = source.view(raw), target.view(raw)
    if target.ndim < 2 or source.flags.c_contiguous:
        np.copyto(target, source)
    elif target.ndim > 2:
        for part, of in zip(target, source, strict=True):
            copy_into(part, of)
    else:
        for i in range(0, target.shape[1], _STRIP):
            target[:, i : i + _STRIP] = source[:, i : i + _STRIP]


def resample_position_embeddings(embeddings: np.ndarray, patches: int) -> np.ndarray:
    """[1, P, D] -> [1, patches, D], bilinear between the corners of the square grids.

    Equals big_vision's resampling (models/vit.py: scipy.ndimage.zoom of order 1), computed in
    float64, except that scipy gives zeros in the last row and column of some sizes (e.g. 32 to 16),
    where its coordinate is rounded to beyond the edge. dtype stays, and an equal size gives the
    very array. Raises CheckpointError if a grid is not square.
    """
    old, new = math.isqrt(embeddings.shape[1]), math.isqrt(patches)
    if old**2 != embeddings.shape[1] or new**2 != patches:
        raise CheckpointError(
            f"{embeddings.shape[1]} position embeddings cannot become {patches}: expected square "
            "numbers. Choose a resolution such as 224, 448 or 896."
        )
    if old == new:
        return embeddings
    # f64[new, old]: row i mixes the two old positions around i * (old - 1) / (new - 1).
    position = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    weights = np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(old)))
    grid = embeddings[0].astype(np.float64).reshape(old, old, -1)
    resampled = np.einsum("io,jp,opd->ijd", weights, weights, grid, optimize=True)
    return resampled.reshape(1, patches, -1).astype(embeddings.dtype)
