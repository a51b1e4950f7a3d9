"""Hugging Face directories: config.json and safetensors in any of the four key layouts."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.weights.arrays import FLOATS, aligned_empty, copy_into
from paligemma_jax.weights.boxes import Box
from paligemma_jax.weights.hf_config import CONFIG, HFConfig
from paligemma_jax.weights.hf_names import (
    EMBEDDING,
    LM_HEAD,
    HFTensor,
    canonical_key,
    hf_shapes,
    hf_tensors,
    is_buffer,
)
from paligemma_jax.weights.published import with_text_length
from paligemma_jax.weights.safetensors_file import SafeTensor
from paligemma_jax.weights.shards import read_tensors
from paligemma_jax.weights.source import Fill, TensorSpec, piece_places, piece_shapes
from paligemma_jax.weights.strict import find_problems, misfit
from paligemma_jax.weights.tree import expected_shapes

_BLOCK = 16 << 20  # bytes of a table in memory while it is compared or cast


class HuggingFaceSource:
    """A Hugging Face directory; see `Source`.

    Filler rows of the embedding table, from the image placeholder on, are dropped. A head that
    differs from the table in the rows kept is kept as "llm/lm_head/w", even where config.json calls
    it tied; an equal one is dropped. A given `config` replaces the file's and must fit the tensors.

    Attributes:
      sliding_window: what config.json asks for. It is not in `config`, as big_vision has none.
    """

    kind = "huggingface"

    def __init__(self, path: Path, config: PaliGemmaConfig | None = None):
        self.path = path
        described = HFConfig(path / CONFIG)
        self.sliding_window = described.sliding_window
        self._tensors = _canonical(path, read_tensors(path))
        if config is None:
            rows = self._rows(EMBEDDING)
            size = min(described.vocab_size or rows, rows)
            untied = not described.tied or LM_HEAD in self._tensors
            untied = untied and self._head_differs(size)
            config = described.to_config(size, tie_embeddings=not untied)
            config = with_text_length(config, path)
        self.config = config
        self._check(config)
        self._parts: dict[str, list[HFTensor]] = {}
        for tensor in hf_tensors(config):
            self._parts.setdefault(tensor.path, []).append(tensor)
        self.specs = {
            name: TensorSpec(shape, self._dtype(name))
            for name, shape in expected_shapes(config).items()
        }

    def _rows(self, key: str) -> int:
        tensor = self._tensors.get(key)
        return tensor.shape[0] if tensor and len(tensor.shape) == 2 else 1

    def _head_differs(self, rows: int) -> bool:
        head, table = self._tensors.get(LM_HEAD), self._tensors.get(EMBEDDING)
        if head is None or table is None or not (head.dtype and table.dtype):
            return True  # the check of the tensors tells what is wrong
        if head.shape != table.shape or len(table.shape) != 2:
            return True
        step = max(1, _BLOCK // (4 * table.shape[1]))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            a, b = head.read(part), table.read(part)
            if head.dtype != table.dtype:
                a, b = a.astype(np.float32), b.astype(np.float32)
            if a.tobytes() != b.tobytes():
                return True
        return False

    def _check(self, config: PaliGemmaConfig) -> None:
        found = {name: tensor.shape for name, tensor in self._tensors.items()}
        expected = hf_shapes(config)
        if config.llm.tie_embeddings:
            found.pop(LM_HEAD, None)
        for table in (EMBEDDING, LM_HEAD):  # more rows than pieces are filler
            if table in found and table in expected and found[table][:1] > expected[table][:1]:
                found[table] = (expected[table][0], *found[table][1:])
        problems = find_problems(found, expected)
        problems += [
            f"dtype       {name}: {self._tensors[name].kind}, model F32, F16 or BF16"
            for name in expected
            if name in found and self._tensors[name].dtype is None
        ]
        if problems:
            raise misfit(self.path, problems)

    def _keys(self, tensor: HFTensor) -> list[str]:
        depth = expected_shapes(self.config)[tensor.path][0] if tensor.layered else 1
        return [tensor.key.format(layer) for layer in range(depth)]

    def _dtype(self, name: str) -> np.dtype:
        """The dtype all tensors of one of ours share; float32 where they differ or are 64-bit."""
        keys = [key for tensor in self._parts[name] for key in self._keys(tensor)]
        kinds = {self._tensors[key].dtype for key in keys}
        (kind,) = kinds if len(kinds) == 1 else (None,)
        return FLOATS["float32"] if kind is None or kind == FLOATS["float64"] else kind

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        parts = self._parts[name]
        places = piece_places(name, self.specs[name].shape)
        rows = [place for place in places if isinstance(place, slice)] or [slice(None)]
        for keys in zip(*map(self._keys, parts), strict=True):
            files = [self._tensors[key] for key in keys]
            for some in rows:
                yield functools.partial(_read_parts, list(zip(parts, files, strict=True)), some)

    def read_box(self, name: str, number: int, box: Box, dtype: np.dtype) -> np.ndarray:
        """See `Sliceable`."""
        shape = self.specs[name].shape
        piece = piece_shapes(name, shape)[number]
        place = piece_places(name, shape)[number]
        rows = place if isinstance(place, slice) else slice(None)
        result = aligned_empty(
            tuple(len(range(n)[i]) for n, i in zip(piece, box, strict=True)), dtype
        )
        for tensor in self._parts[name]:
            file = self._tensors[self._keys(tensor)[number if tensor.layered else 0]]
            if tensor.part is None:
                copy_into(result, tensor.to_ours(file.map()[rows], piece)[box])
            elif tensor.part in range(piece[0])[box[0]]:
                own = tensor.to_ours(file.map(), piece[1:])[box[1:]]
                copy_into(result[tensor.part - (box[0].start or 0)], own)
        return result

    @property
    def sliceable(self) -> "HuggingFaceSource":
        """See `read_boxes`."""
        return self

    def close(self) -> None:
        """Nothing stays open between reads."""


def _read_parts(parts: list[tuple[HFTensor, SafeTensor]], rows: slice, target: np.ndarray) -> None:
    for tensor, file in parts:
        _read_part(tensor, file, rows, target if tensor.part is None else target[tensor.part])


def _read_part(tensor: HFTensor, file: SafeTensor, rows: slice, target: np.ndarray) -> None:
    theirs = tensor.as_theirs(target)
    first = rows.start or 0
    if theirs is None:  # the target lies otherwise in memory
        copy_into(target, tensor.to_ours(file.read(rows), target.shape))
    elif file.dtype == target.dtype:
        file.read(slice(first, first + len(theirs)), out=theirs)
    else:
        step = max(1, _BLOCK // (theirs.nbytes // len(theirs)))
        for start in range(0, len(theirs), step):
            stop = min(start + step, len(theirs))
            copy_into(theirs[start:stop], file.read(slice(first + start, first + stop)))


def _canonical(path: Path, tensors: dict[str, SafeTensor]) -> dict[str, SafeTensor]:
    result: dict[str, SafeTensor] = {}
    origin: dict[str, str] = {}
    problems = []
    for key, tensor in tensors.items():
        if is_buffer(key):
            continue
        name = canonical_key(key)
        if name in result:
            problems.append(f"duplicate   {key} and {origin[name]} are the same tensor")
        result[name], origin[name] = tensor, key
    if problems:
        raise misfit(path, problems)
    return result
