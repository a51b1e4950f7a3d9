"""Writing safetensors: files whose layout is known first, and filled in any order."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from paligemma_jax.weights.arrays import FLOATS, as_bytes
from paligemma_jax.weights.shards import INDEX, SINGLE
from paligemma_jax.weights.source import TensorSpec

_KINDS = {FLOATS["float32"]: "F32", FLOATS["float16"]: "F16", FLOATS["bfloat16"]: "BF16"}
_ALIGNMENT = 8  # bytes, of where the tensors begin


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays, marked as PyTorch tensors, as transformers and PEFT mark theirs."""
    specs = {n: TensorSpec(a.shape, a.dtype) for n, a in sorted(tensors.items())}
    with path.open("wb") as file:
        file.write(header(specs))
        for name in specs:
            file.write(as_bytes(np.ascontiguousarray(tensors[name])))


def header(specs: Mapping[str, TensorSpec]) -> bytes:
    """What a file begins with whose tensors follow in this order, without gaps."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        entries[name] = {
            "dtype": _KINDS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


@dataclasses.dataclass(frozen=True)
class _Place:
    file: IO[bytes]
    offset: int  # bytes from the start of the file
    spec: TensorSpec


class ShardWriter:
    """The safetensors files of a directory, to be filled tensor by tensor, in any order."""

    def __init__(self, places: Mapping[str, _Place]):
        self._places = places

    def write(self, name: str, array: np.ndarray, row: int = 0) -> None:
        """Writes a C-order array as the rows of a tensor that begin with `row`."""
        place = self._places[name]
        row_bytes = math.prod(place.spec.shape[1:]) * place.spec.dtype.itemsize
        place.file.seek(place.offset + row * row_bytes)
        place.file.write(as_bytes(array))


@contextlib.contextmanager
def write_shards(
    directory: Path, specs: Mapping[str, TensorSpec], shard_bytes: int
) -> Iterator[ShardWriter]:
    """Yields the writer of files of up to `shard_bytes`, named as transformers names them.

    Every tensor must be written. One file has no index. Raises OSError.
    """
    shards = _shards(specs, shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    places: dict[str, _Place] = {}
    with contextlib.ExitStack() as stack:
        for name, shard in zip(names, shards, strict=True):
            file = stack.enter_context((directory / name).open("wb"))
            start = header(shard)
            file.write(start)
            offset = len(start)
            for key, spec in shard.items():
                places[key] = _Place(file, offset, spec)
                offset += spec.nbytes
        yield ShardWriter(places)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
            "weight_map": {
                key: name for name, shard in zip(names, shards, strict=True) for key in shard
            },
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[dict[str, TensorSpec]]:
    """Tensors in their order, a new group where one of `shard_bytes` is full."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if filled and filled + spec.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    return shards
