"""Reading safetensors files tensor by tensor, straight into place.

Not the safetensors library: it maps the whole file, and pages of the map count as the process's
memory next to the weights made from them. The format is a header length (8 bytes, little endian), a
JSON header, and the tensors' bytes without gaps.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.arrays import FLOATS, as_bytes

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
