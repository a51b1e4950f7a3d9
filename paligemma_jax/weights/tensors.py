"""What checkpoints, models and arrays all offer: a configuration, and tensors piece by piece.

Numpy arrays that JAX on CPU takes over without copying, and fast copies into them.

The shape of every parameter that a configuration asks for, by its path.

Paths join the keys of the nested dict with "/", e.g. "llm/layers/attn/q_einsum/w".

The strict comparison of a checkpoint's tensors with the model's: all problems at once.

Reading parts of tensors, as far as the files let one: each process its own.

A box is a slice for each axis of a piece (see `Weights`).

Position embeddings for another resolution.
"""

import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from paligemma_jax.config import GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.errors import CheckpointError, ConfigError

DTypeLike = Any  # a name such as "bfloat16", a numpy or a JAX dtype

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}
# What stores may hold: floats, and numbers of few bits.
NUMBERS = {**FLOATS, **{d.name: d for d in map(np.dtype, (np.int8, ml_dtypes.float8_e4m3fn))}}
_ALIGNMENT = 64  # bytes; jax.device_put on CPU aliases arrays that start at a multiple of it
_STRIP = 32  # columns; a strip of both sides of a transposition stays in the cache (5x faster)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised C-order array whose data starts at a multiple of 64 bytes."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
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
        return
    if target.ndim > 2:
        for part, of in zip(target, source, strict=True):
            copy_into(part, of)
        return
    for i in range(0, target.shape[1], _STRIP):
        target[:, i : i + _STRIP] = source[:, i : i + _STRIP]


def as_float_dtype(dtype: DTypeLike) -> np.dtype:
    """A floating dtype parameters can have; ConfigError for any other."""
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in ("float32", "float16", "bfloat16"):
        raise ConfigError(
            f"Parameters of dtype {name} cannot be loaded. float32, bfloat16 and float16 fit. "
            'Say for example: dtype="bfloat16"'
        )
    return FLOATS[name]


SourceShape = tuple[int, ...]
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

    shape: SourceShape
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


def piece_places(name: str, shape: SourceShape) -> list[Any]:
    """Where each piece of a tensor is on its first axis: a number, a slice, or `...` for all."""
    if name.startswith(LAYERED):
        return list(range(shape[0]))
    if name in TABLES:
        starts = range(0, shape[0], TABLE_ROWS)
        return [slice(start, min(start + TABLE_ROWS, shape[0])) for start in starts]
    return [...]


def piece_shapes(name: str, shape: SourceShape) -> list[SourceShape]:
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


TreeShape = tuple[int, ...]


def expected_shapes(config: PaliGemmaConfig) -> dict[str, TreeShape]:
    """Every parameter's path and shape, layers stacked on a leading axis."""
    return _img_shapes(config.img, config.llm.width) | _llm_shapes(config.llm)


def _img_shapes(c: SigLIPConfig, out_width: int) -> dict[str, TreeShape]:
    heads = (c.num_heads, c.head_dim)
    shapes: dict[str, TreeShape] = {
        "patch_embed/kernel": (c.patch_size, c.patch_size, 3, c.width),
        "patch_embed/bias": (c.width,),
        "pos_embed": (1, c.num_patches, c.width),
    }
    layer: dict[str, TreeShape] = {}
    for norm in ("norm1", "norm2"):
        layer |= {f"{norm}/scale": (c.width,), f"{norm}/bias": (c.width,)}
    for projection in ("q", "k", "v"):
        layer |= {
            f"attn/{projection}/kernel": (c.width, *heads),
            f"attn/{projection}/bias": heads,
        }
    layer |= {"attn/out/kernel": (*heads, c.width), "attn/out/bias": (c.width,)}
    layer |= {"mlp/fc1/kernel": (c.width, c.mlp_dim), "mlp/fc1/bias": (c.mlp_dim,)}
    layer |= {"mlp/fc2/kernel": (c.mlp_dim, c.width), "mlp/fc2/bias": (c.width,)}
    shapes |= {f"blocks/{name}": (c.depth, *shape) for name, shape in layer.items()}
    shapes |= {"norm/scale": (c.width,), "norm/bias": (c.width,)}
    shapes |= {"head/kernel": (c.width, out_width), "head/bias": (out_width,)}
    return {f"img/{name}": shape for name, shape in shapes.items()}


def _llm_shapes(c: GemmaConfig) -> dict[str, TreeShape]:
    layer: dict[str, TreeShape] = {
        "attn/q_einsum/w": (c.num_heads, c.width, c.head_dim),
        "attn/kv_einsum/w": (2, c.num_kv_heads, c.width, c.head_dim),
        "attn/attn_vec_einsum/w": (c.num_heads, c.head_dim, c.width),
        "mlp/gating_einsum/w": (2, c.width, c.mlp_dim),
        "mlp/linear/w": (c.mlp_dim, c.width),
        "pre_attention_norm/scale": (c.width,),
        "pre_ffw_norm/scale": (c.width,),
    }
    if c.post_norms:
        layer |= {"post_attention_norm/scale": (c.width,), "post_ffw_norm/scale": (c.width,)}
    shapes: dict[str, TreeShape] = {"embedder/input_embedding": (c.vocab_size, c.width)}
    shapes |= {f"layers/{name}": (c.depth, *shape) for name, shape in layer.items()}
    shapes["final_norm/scale"] = (c.width,)
    if not c.tie_embeddings:
        shapes["lm_head/w"] = (c.vocab_size, c.width)
    return {f"llm/{name}": shape for name, shape in shapes.items()}


def find_problems(
    found: Mapping[str, TreeShape | None], expected: Mapping[str, TreeShape | None]
) -> list[str]:
    """One line for each missing, unexpected or misshaped tensor; a shape of None fits any."""
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


def _spell(shape: TreeShape | None) -> str:
    return "" if shape is None else f" {shape}"


def _similar(name: str, candidates: Sequence[str]) -> str:
    # A renamed tensor is the usual cause of one missing and one unexpected; long lists are another
    # architecture, where resemblance says nothing and comparing all pairs takes long.
    if not 0 < len(candidates) <= 50:
        return ""
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
    return f" (is it {close[0]}?)" if close else ""


def require_fit(
    path: str | os.PathLike[str], found: Mapping[str, TreeShape], expected: Mapping[str, TreeShape]
) -> None:
    """Raises one CheckpointError that names every tensor which does not fit."""
    problems = find_problems(found, expected)
    if problems:
        raise misfit(path, problems)


def misfit(path: str | os.PathLike[str], problems: Sequence[str]) -> CheckpointError:
    """The error for a checkpoint whose tensors do not fit the model."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    listing = "\n  ".join(problems)
    return CheckpointError(
        f"Checkpoint {os.fspath(path)} does not fit the model ({count}):\n  {listing}\n"
        "A PaliGemma or PaliGemma 2 checkpoint with exactly the tensors of its configuration fits. "
        f"See what it holds with: paligemma info {os.fspath(path)}"
    )


Box = tuple[slice, ...]


@runtime_checkable
class Sliceable(Protocol):
    """Weights of which any piece can be read without the others."""

    def read_box(self, name: str, number: int, box: Box, dtype: np.dtype) -> np.ndarray:
        """A part of one piece of a tensor; little more is read, or the piece at most.

        Raises CheckpointError.
        """
        ...


def read_boxes(
    weights: Weights, name: str, boxes: Sequence[Box | None], dtype: np.dtype
) -> Iterator[np.ndarray | None]:
    """A part of each piece of a tensor in turn, None where none is wanted; raises CheckpointError.

    Nothing of a piece is held when the next one is asked for. Weights with `sliceable` parts give
    them alone; others are read from the first piece to the last one that is wanted.
    """
    parts: Sliceable | None = getattr(weights, "sliceable", None)
    if parts is not None:
        for number, box in enumerate(boxes):
            yield None if box is None else parts.read_box(name, number, box, dtype)
        return
    shapes = piece_shapes(name, weights.specs[name].shape)
    wanted = [number for number, box in enumerate(boxes) if box is not None]
    fills = weights.pieces(name, dtype)
    for number, (shape, box) in enumerate(zip(shapes, boxes, strict=True)):
        if wanted and number <= wanted[-1]:
            piece = aligned_empty(shape, dtype)
            next(fills)(piece)  # also where it is not wanted: what follows it comes after it
            yield None if box is None else piece[box]
            del piece
        else:
            yield None


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
