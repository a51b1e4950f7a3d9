"""Reading npz files one array at a time, without trusting what they claim.

Not `np.load`: it reads whole arrays into fresh memory, believes any claimed size, and takes the
last of two arrays with one name. Pickled arrays are refused, since unpickling runs code.
"""

import contextlib
import dataclasses
import functools
import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.arrays import BFLOAT16, aligned_empty
from paligemma_jax.weights.npz_stream import ArrayStream, COrderStream, FortranOrderStream
from paligemma_jax.weights.parts import PartsFile
from paligemma_jax.weights.source import Fill

_MAX_ARRAYS = 10_000
_MAX_INFLATION = 100  # weights compress to about half, a bomb of zeros to a thousandth
_FREE_INFLATION = 64 << 20  # bytes that any file may unpack to


@dataclasses.dataclass(frozen=True)
class NpzArray:
    """One array of the file; bfloat16, which numpy stores as 2-byte void, has its dtype again."""

    member: zipfile.ZipInfo
    header_size: int
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool


class NpzFile:
    """An npz file, whole or in parts; `arrays` maps names to shapes and dtypes.

    Opening reads headers only. Raises CheckpointError listing every array that is no plain array.
    """

    def __init__(self, path: Path, parts: list[Path]):
        self.path = path
        self._raw = PartsFile(parts)
        try:
            self._zip = zipfile.ZipFile(io.BufferedReader(self._raw, 1 << 20))
        except (zipfile.BadZipFile, ValueError, OSError) as e:
            problem = _sniff(self._raw, len(parts))
            self._raw.close()
            raise CheckpointError(
                f"{path} {problem}. A whole npz file as big_vision writes it fits. Download it "
                "again."
            ) from e
        self.arrays: dict[str, NpzArray] = {}
        problems = self._read_headers()
        if problems:
            self.close()
            raise CheckpointError(
                f"{path} cannot be read safely ({len(problems)} problems):\n  "
                + "\n  ".join(problems)
                + "\nAn npz file of plain float arrays, as big_vision writes it, fits. Nothing was "
                "unpickled. Download it again from where it was published."
            )

    def _read_headers(self) -> list[str]:
        members = self._zip.infolist()
        if len(members) > _MAX_ARRAYS:
            return [f"{len(members):,} arrays, which no PaliGemma has"]
        unpacked = sum(member.file_size for member in members)
        if unpacked > _FREE_INFLATION + _MAX_INFLATION * self._raw.size:
            return [f"{self._raw.size:,} bytes claim to unpack to {unpacked:,}"]
        problems = []
        for member in members:
            name = member.filename.removesuffix(".npy")
            try:
                array = self._read_header(member)
            except Exception as e:  # untrusted bytes provoke many kinds
                problems.append(f"{member.filename}: {e}")
                continue
            if name in self.arrays:
                problems.append(f"{name}: two arrays have this name")
            self.arrays[name] = array
        return problems

    def _read_header(self, member: zipfile.ZipInfo) -> NpzArray:
        if not member.filename.endswith(".npy"):
            raise ValueError("no array")
        if member.flag_bits & 1:
            raise ValueError("encrypted")
        with self._zip.open(member) as file:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                header = np.lib.format.read_array_header_1_0(file)
            elif version == (2, 0):
                header = np.lib.format.read_array_header_2_0(file)
            else:
                raise ValueError(f"unknown npy version {version}")
            header_size = file.tell()
        shape, fortran_order, dtype = header
        if dtype.hasobject:
            raise ValueError("pickled objects, refused")
        if not dtype.isnative:
            raise ValueError("big-endian numbers")
        if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
            dtype = BFLOAT16
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or header_size + size != member.file_size:
            raise ValueError(
                f"shape {shape} takes {size:,} bytes, {member.file_size - header_size:,} are there"
            )
        return NpzArray(member, header_size, shape, dtype, fortran_order)

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """One array as aligned C order of `dtype`, cast block by block; raises CheckpointError."""
        result = aligned_empty(self.arrays[name].shape, dtype)
        for fill in self.parts(name, 1):
            fill(result)
        return result

    def parts(self, name: str, count: int) -> Iterator[Fill]:
        """What fills arrays with an array's `count` parts in turn; see `Weights.pieces`.

        Raises CheckpointError, and so does what it gives.
        """
        array = self.arrays[name]
        with contextlib.ExitStack() as stack:
            with self._one_error(name):
                file = stack.enter_context(self._zip.open(array.member))
                file.read(array.header_size)
                if array.fortran_order:
                    stream = FortranOrderStream(file.read, array.shape, array.dtype)
                else:
                    stream = COrderStream(file.read, array.dtype)
            for _ in range(count):
                yield functools.partial(self._fill, name, stream)

    def _fill(self, name: str, stream: ArrayStream, target: np.ndarray) -> None:
        with self._one_error(name):
            stream.fill(target)

    @contextlib.contextmanager
    def _one_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as e:
            raise CheckpointError(
                f"{self.path} is damaged at {name}: {e}. A whole file fits. Download it again."
            ) from e

    def close(self) -> None:
        self._zip.close()
        self._raw.close()


def _sniff(raw: PartsFile, number_of_parts: int) -> str:
    """What a file that is no zip seems to be."""
    raw.seek(0)
    start = raw.read(4096) or b""
    if not start:
        return "is empty"
    if start.startswith(b"PK\x03\x04"):
        part = " or its last part is missing" if number_of_parts > 1 else ""
        return f"is truncated: {raw.size:,} bytes without the end of an npz file{part}"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the checkpoint itself (run: git lfs pull)"
    if start[:1] == b"\x80":
        return "is a Python pickle, which is refused because loading one runs its code"
    if start.startswith(b"\x93NUMPY"):
        return "is a single npy array, no npz file"
    try:
        start.decode()
    except UnicodeDecodeError:
        return "is no npz file"
    return f"is a text file, no npz file; it begins with {start[:40].decode(errors='replace')!r}"
