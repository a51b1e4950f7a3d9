"""Reading safetensors files tensor by tensor, straight into place.

Not the safetensors library: it maps the whole file, and pages of the map count as the process's
memory next to the weights made from them. The format is a header length (8 bytes, little endian), a
JSON header, and the tensors' bytes without gaps.

The safetensors files of a Hugging Face directory: one, or shards under an index.

Writing safetensors: files whose layout is known first, and filled in any order.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.tensors import FLOATS, TensorSpec, as_bytes

# What transformers writes; those that numpy lacks have a size only.
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8}
_SIZES |= {"U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_FLOATS = {
    "F64": FLOATS["float64"],
    "F32": FLOATS["float32"],
    "F16": FLOATS["float16"],
    "BF16": FLOATS["bfloat16"],
}
_MAX_HEADER = 100 << 20  # bytes, the library's own limit


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    """Where one tensor lies; `dtype` is None for what is no float."""

    file: Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    kind: str  # the file's word for the dtype
    dtype: np.dtype | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.kind]

    def read(self, rows: slice = slice(None), out: np.ndarray | None = None) -> np.ndarray:
        """`rows` of the first axis, into the C-order `out` if given; raises CheckpointError."""
        start, stop, _ = rows.indices(self.shape[0])
        row = math.prod(self.shape[1:])
        if out is None:
            out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        buffer = as_bytes(out)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + start * row * _SIZES[self.kind])
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(
                        f"{self.file} ended while it was read. A whole file fits. Download it "
                        "again."
                    )
                done += count
        return out

    def map(self) -> np.ndarray:
        """A tensor of floats where it lies: only what is copied of it is read.

        What was touched counts as the process's memory until the array is gone.
        """
        dtype = np.dtype(self.dtype)
        return np.memmap(self.file, dtype, "r", self.offset, self.shape)


class _Malformed(ValueError):
    pass


def read_header(path: Path) -> dict[str, SafeTensor]:
    """Every tensor of a file; CheckpointError for a damaged, truncated or foreign one."""
    try:
        return _parse(path)
    except OSError as e:
        reason = e.strerror or str(e)
    except _Malformed as e:
        reason = str(e)
    raise CheckpointError(
        f"{path.name}: {reason}. A whole safetensors file fits. Download it again into "
        f"{path.parent}."
    )


def _parse(path: Path) -> dict[str, SafeTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if start.startswith(b"version https://git-lfs"):
            raise _Malformed("a Git LFS pointer, not the weights (run: git lfs pull)")
        if len(start) < 8:
            raise _Malformed(f"truncated, {size} bytes")
        if length > _MAX_HEADER:
            raise _Malformed("no safetensors file")
        if 8 + length > size:
            raise _Malformed(f"truncated, its header of {length:,} bytes ends beyond {size:,}")
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise _Malformed(f"no safetensors file ({e})") from e
    if not isinstance(header, dict):
        raise _Malformed("no safetensors file")
    header.pop("__metadata__", None)
    tensors = {}
    spans = []
    for name, entry in header.items():
        tensor, span = _tensor(path, 8 + length, name, entry)
        tensors[name] = tensor
        spans.append(span)
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    for (begin, _), end in zip(spans, ends, strict=False):
        if begin != end:
            raise _Malformed(f"tensors overlap or leave a gap at byte {min(begin, end):,}")
    promised = 8 + length + ends[-1]
    if promised != size:
        problem = "truncated" if size < promised else "too long"
        raise _Malformed(f"{problem}, {size:,} bytes of {promised:,}")
    return tensors


def _tensor(path: Path, data: int, name: str, entry: Any) -> tuple[SafeTensor, tuple[int, int]]:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        known = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as e:
        raise _Malformed(f"the entry of {name} is malformed") from e
    if kind not in _SIZES:
        raise _Malformed(f"{name} has the unknown dtype {kind}")
    if not known or end - begin != math.prod(shape) * _SIZES[kind]:
        raise _Malformed(f"the size of {name} contradicts its shape")
    return SafeTensor(path, data + begin, shape, kind, _FLOATS.get(kind)), (begin, end)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is there twice")
    return result


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_tensors(directory: Path) -> dict[str, SafeTensor]:
    """Every tensor under its name in the files; CheckpointError listing all problems at once."""
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    if not (directory / INDEX).is_file():
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        only = f", only the pickled {pickles[0]}, which is refused" if pickles else ""
        raise CheckpointError(
            f"{directory} has no {SINGLE} and no {INDEX}{only}. A Hugging Face directory with "
            "safetensors fits. Download it whole, or save again with: "
            "model.save_pretrained(directory, safe_serialization=True)"
        )
    weight_map = _read_index(directory / INDEX)
    tensors: dict[str, SafeTensor] = {}
    problems: list[str] = []
    for shard in sorted(set(weight_map.values())):
        problem = _unsafe(directory, shard)
        if problem:
            problems.append(problem)
            continue
        try:
            found = read_header(directory / shard)
        except CheckpointError as e:
            problems.append(str(e).split(". A whole")[0])
            continue
        for name, tensor in found.items():
            if name in tensors:
                problems.append(f"{name} is in {tensors[name].file.name} and in {shard}")
            elif name not in weight_map:
                problems.append(f"{name} of {shard} is not in the index")
            tensors[name] = tensor
        problems += [
            f"{name} is not in {shard}, where the index says it is"
            for name, where in weight_map.items()
            if where == shard and name not in found
        ]
    if problems:
        listing = "\n  ".join(problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(
            f"The shards in {directory} are not as {INDEX} says ({count}):\n"
            f"  {listing}\n"
            "All shards that the index names, whole and side by side, fit. Download the directory "
            "again."
        )
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(
            f'{path} is no index of shards. JSON with "weight_map": {{tensor: file}} fits. '
            "Download it again."
        ) from e
    return weight_map


def _unsafe(directory: Path, shard: str) -> str | None:
    """Why a file the index names must not or cannot be opened."""
    path = directory / shard
    if "/" in shard or "\\" in shard or "\0" in shard or shard in ("", ".", ".."):
        return f"the index names {shard!r}, which is no plain file name"
    if not path.exists():
        return f"{shard} is missing"
    # The hub's cache links snapshots/REVISION/FILE to blobs/HASH; no other way out is allowed.
    blobs = directory.resolve().parent.parent / "blobs"
    if not any(path.resolve().is_relative_to(root) for root in (directory.resolve(), blobs)):
        return f"{shard} links to {path.resolve()}, outside of the directory"
    return None


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
