"""Safetensors files: read tensor by tensor straight into place, and written in any order.

Not the safetensors library: it maps whole files, whose pages count as the process's memory beside
the weights made from them, does not tell where a tensor lies, and writes a file only from all of
its tensors at once. A file is the header's length (8 bytes, little endian), a JSON header, and the
tensors' bytes without gaps.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from paligemma_jax.errors import CheckpointError, problem_list
from paligemma_jax.weights.tensors import FLOATS, TensorSpec, as_bytes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What transformers writes; those that are not floats have a size only.
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8}
_SIZES |= {"U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_FLOATS = {
    "F64": FLOATS["float64"],
    "F32": FLOATS["float32"],
    "F16": FLOATS["float16"],
    "BF16": FLOATS["bfloat16"],
}
_NAMES = {dtype: name for name, dtype in _FLOATS.items()}
_MAX_HEADER = 100 << 20  # bytes, the library's own limit
_ALIGNMENT = 8  # bytes, of where the tensors begin


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    """Where one tensor lies; `dtype` is None for what is not a float."""

    file: Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    kind: str  # the file's name of the dtype
    dtype: np.dtype | None

    def read(self, rows: slice = slice(None), out: np.ndarray | None = None) -> np.ndarray:
        """`rows` of the first axis, into the C-order `out` if given; raises CheckpointError."""
        start, stop, _ = rows.indices(self.shape[0])
        if out is None:
            out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        buffer = as_bytes(out)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + start * math.prod(self.shape[1:]) * _SIZES[self.kind])
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(
                        f"{self.file} ended while it was read. Download it again."
                    )
                done += count
        return out

    def map(self) -> np.ndarray:
        """A tensor of floats where it lies: only what is copied of it is read.

        What was touched counts as the process's memory until the array is gone.
        """
        return np.memmap(self.file, np.dtype(self.dtype), "r", self.offset, self.shape)


def read_header(path: Path) -> dict[str, SafeTensor]:
    """Every tensor of a file; CheckpointError for a damaged, truncated or foreign one."""
    try:
        return _parse(path)
    except (OSError, ValueError, RecursionError) as e:
        reason = (e.strerror if isinstance(e, OSError) else None) or e
        raise CheckpointError(
            f"{path.name}: {reason}. Download the whole file again into {path.parent}."
        ) from e


def _parse(path: Path) -> dict[str, SafeTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if start.startswith(b"version https://git-lfs"):
            raise ValueError("a Git LFS pointer, not the weights (run: git lfs pull)")
        if len(start) < 8:
            raise ValueError(f"truncated, {size} bytes")
        if length > _MAX_HEADER:
            raise ValueError("not a safetensors file")
        if 8 + length > size:
            raise ValueError(f"truncated, its header of {length:,} bytes ends beyond {size:,}")
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not a safetensors file ({e})") from e
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file")
    header.pop("__metadata__", None)
    tensors: dict[str, SafeTensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            known = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        except (TypeError, KeyError, ValueError) as e:
            raise ValueError(f"the entry of {name} is malformed") from e
        if kind not in _SIZES:
            raise ValueError(f"{name} has the unknown dtype {kind}")
        if not known or end - begin != math.prod(shape) * _SIZES[kind]:
            raise ValueError(f"the size of {name} contradicts its shape")
        tensors[name] = SafeTensor(path, 8 + length + begin, shape, kind, _FLOATS.get(kind))
        spans.append((begin, end))
    end = 0
    for begin, after in sorted(spans):
        if begin != end:
            raise ValueError(f"tensors overlap or leave a gap at byte {min(begin, end):,}")
        end = after
    if 8 + length + end != size:
        problem = "truncated" if size < 8 + length + end else "too long"
        raise ValueError(f"{problem}, {size:,} bytes of {8 + length + end:,}")
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is there twice")
    return result


def read_tensors(directory: Path) -> dict[str, SafeTensor]:
    """Every tensor of a Hugging Face directory's files, one or shards under an index.

    Raises CheckpointError listing all problems at once.
    """
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    if not (directory / INDEX).is_file():
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        only = f", only the pickled {pickles[0]}, which is refused" if pickles else ""
        raise CheckpointError(
            f"{directory} has no {SINGLE} and no {INDEX}{only}. Download the directory whole, or "
            "save the model again: model.save_pretrained(directory, safe_serialization=True)"
        )
    try:
        weight_map = json.loads((directory / INDEX).read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not all(isinstance(file, str) for file in shards):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(
            f'{directory / INDEX} is not an index of shards: expected JSON with "weight_map": '
            "{tensor: file}. Download it again."
        ) from e
    headers: dict[str, dict[str, SafeTensor]] = {}
    problems: list[str] = []
    for shard in shards:
        try:
            _require_inside(directory, shard)
            headers[shard] = read_header(directory / shard)
        except (CheckpointError, ValueError) as e:
            problems.append(str(e).split(". Download")[0])
    problems += [
        f"{name} is not in {shard}, where the index says it is"
        for name, shard in weight_map.items()
        if shard in headers and name not in headers[shard]
    ]
    if problems:
        raise CheckpointError(
            f"The shards in {directory} do not match {INDEX} {problem_list(problems)}\n"
            "Download the whole directory again."
        )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _require_inside(directory: Path, shard: str) -> None:
    """Raises ValueError for a file that the index must not name, or that is missing."""
    path = directory / shard
    if "/" in shard or "\\" in shard or "\0" in shard or shard in ("", ".", ".."):
        raise ValueError(f"the index names {shard!r}, which is not a plain file name")
    if not path.exists():
        raise ValueError(f"{shard} is missing")
    # The hub's cache links snapshots/REVISION/FILE to blobs/HASH; no other way out is allowed.
    blobs = directory.resolve().parent.parent / "blobs"
    if not any(path.resolve().is_relative_to(root) for root in (directory.resolve(), blobs)):
        raise ValueError(f"{shard} links to {path.resolve()}, outside of the directory")


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays, marked as PyTorch tensors, as transformers and PEFT mark theirs."""
    specs = {n: TensorSpec(a.shape, a.dtype) for n, a in sorted(tensors.items())}
    with path.open("wb") as file:
        file.write(_header(specs))
        for name in specs:
            file.write(as_bytes(np.ascontiguousarray(tensors[name])))


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    """What a file begins with whose tensors follow in this order, without gaps."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        offsets = [start, end]
        entries[name] = {
            "dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """The safetensors files of a directory, to be filled tensor by tensor, in any order."""

    def __init__(self, places: Mapping[str, tuple[IO[bytes], int, TensorSpec]]):
        self._places = places

    def write(self, name: str, array: np.ndarray, row: int = 0) -> None:
        """Writes a C-order array as the rows of a tensor that begin with `row`."""
        file, offset, spec = self._places[name]
        file.seek(offset + row * math.prod(spec.shape[1:]) * spec.dtype.itemsize)
        file.write(as_bytes(array))


@contextlib.contextmanager
def write_shards(
    directory: Path, specs: Mapping[str, TensorSpec], shard_bytes: int
) -> Iterator[ShardWriter]:
    """Yields the writer of files of up to `shard_bytes`, named as transformers names them.

    Every tensor must be written. One file has no index. Raises OSError.
    """
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if filled and filled + spec.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    places: dict[str, tuple[IO[bytes], int, TensorSpec]] = {}
    with contextlib.ExitStack() as stack:
        for name, shard in zip(names, shards, strict=True):
            file = stack.enter_context((directory / name).open("wb"))
            start = _header(shard)
            file.write(start)
            offset = len(start)
            for key, spec in shard.items():
                places[key] = (file, offset, spec)
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
