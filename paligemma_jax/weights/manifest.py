"""The digests a stored checkpoint carries: sha256 of every file and of every array.

Array data on disk has no checksum of its own: a flipped bit would load as another weight.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.arrays import NUMBERS, as_bytes
from paligemma_jax.weights.source import TensorSpec

MANIFEST = "MANIFEST.json"
FORMAT = "paligemma-jax"
STACKED = 1  # the version in which every parameter was one array
PIECES = 2  # layers, and groups of rows of the table of tokens, are arrays of their own
FEW_BITS = 3  # and there are matrices of few bits among them
NEWEST = FEW_BITS


@dataclasses.dataclass(frozen=True)
class FileDigest:
    """Size in bytes and sha256 of one file."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ArrayDigest:
    """dtype, shape, size in bytes, and sha256 of the array's little-endian C-order bytes."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.shape, NUMBERS[self.dtype])


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Digests by relative path and by path of the array, in a store of some version."""

    files: Mapping[str, FileDigest]
    arrays: Mapping[str, ArrayDigest]
    version: int = PIECES

    def write(self, directory: Path) -> None:
        """Writes and synchronises MANIFEST.json; the last file of a store."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        with (directory / MANIFEST).open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Inverse of `write`; CheckpointError for a missing, foreign, newer or damaged one."""
        try:
            content = json.loads((directory / MANIFEST).read_bytes())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}")
            version = int(content["version"])
            if version > NEWEST:
                raise CheckpointError(
                    f"{directory} is a store of version {version}; this library reads up to "
                    f"{NEWEST}. A newer library fits. Run: pip install --upgrade paligemma-jax"
                )
            return cls(
                files={name: _file_digest(v) for name, v in content["files"].items()},
                arrays={name: _array_digest(v) for name, v in content["arrays"].items()},
                version=version,
            )
        except OSError as e:
            raise _unfit(directory, f"has no readable {MANIFEST}, so it is unfinished") from e
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise _unfit(directory, f"has a damaged {MANIFEST}") from e

    def find_lost_files(self, directory: Path) -> list[str]:
        """One line for each file that is missing or has another size."""
        problems = []
        for name, digest in self.files.items():
            path = directory / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != digest.bytes:
                problems.append(f"{name} has {path.stat().st_size:,} bytes of {digest.bytes:,}")
        return problems

    def find_changed_files(self, directory: Path, prefix: str = "") -> list[str]:
        """One line for each file, of those whose name begins with `prefix`, with another sha256."""
        names = [name for name in self.files if name.startswith(prefix)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = pool.map(file_sha256, [directory / name for name in names])
            return [
                f"{name} was changed (sha256 differs)"
                for name, sha256 in zip(names, found, strict=True)
                if sha256 != self.files[name].sha256
            ]


def _file_digest(values: Mapping[str, Any]) -> FileDigest:
    digest = FileDigest(**values)
    if not isinstance(digest.bytes, int) or not isinstance(digest.sha256, str):
        raise ValueError(f"{digest}")
    return digest


def _array_digest(values: Mapping[str, Any]) -> ArrayDigest:
    digest = ArrayDigest(**{**values, "shape": tuple(values["shape"])})
    if digest.dtype not in NUMBERS or digest.spec.nbytes != digest.bytes:
        raise ValueError(f"{digest}")
    return digest


def _unfit(directory: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{directory} {problem}. A directory that the conversion finished fits. Convert again into "
        "a new one: paligemma convert SOURCE TARGET"
    )


def digest_files(directory: Path) -> dict[str, FileDigest]:
    """Digests of every file under `directory`, by relative path with "/"."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): FileDigest(path.stat().st_size, file_sha256(path))
        for path in paths
    }


def digest_array(array: np.ndarray) -> ArrayDigest:
    """Digest of a C-order array."""
    return ArrayDigest(
        array.dtype.name, array.shape, array.nbytes, hashlib.sha256(as_bytes(array)).hexdigest()
    )


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
