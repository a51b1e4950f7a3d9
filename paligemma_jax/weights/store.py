"""The native checkpoint: a directory with weights in Orbax's format and checksums of everything.

config.json      the architecture, and the formats of quantized weights
processor.json   how images and prompts are prepared
tokenizer.model  the SentencePiece model
mask_codec.npz   the codec of <seg> tokens, where there is one
params/          an array for each chunk of a tensor (see `tensors`), by Orbax
MANIFEST.json    sha256 of every file and array, written last

Array data on disk has no checksum of its own: a flipped bit would load as another weight. Quantized
weights are stored as they are multiplied, in PATH/matrix/values and PATH/matrix/scale, where PATH
is that of the inference layout ("llm/layers/attn/qkv"); those of 4 bits are two a byte.

No other module knows Orbax. It is imported when it is used, since that takes a while.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError, problem_list
from paligemma_jax.filesystem import read_json, sync_tree
from paligemma_jax.models.paligemma import flatten, nest
from paligemma_jax.models.quantization_config import QuantizationConfig
from paligemma_jax.weights.formats import CheckpointFormat, CheckpointMetadata, CheckpointReader
from paligemma_jax.weights.sidecar_files import MASK_CODEC, checksum_problems, file_sha256
from paligemma_jax.weights.tensors import (
    EMBEDDING_TABLES,
    FLOATS,
    LAYER_STACKS,
    STORED_DTYPES,
    Shape,
    TensorSource,
    TensorSpec,
    as_bytes,
    chunk_shapes,
    copy_into,
    read_chunks,
    shape_problems,
    tensor_groups,
    validation_error,
)
from paligemma_jax.weights.views import float_shapes, quantized_specs

MANIFEST = "MANIFEST.json"
FORMAT, VERSION = "paligemma-jax", 2
PARAMS = "params"
QUANTIZATION = "quantization"  # in config.json: the format of each kind of weight
CONFIG, PROCESSOR, TOKENIZER = "config.json", "processor.json", "tokenizer.model"

_CHUNK = 64 << 20  # bytes; what reading and writing need beyond the array itself is a few of these
_IN_FLIGHT = 2 * _CHUNK
_GROUPS = 4  # that may be read in turn: more than a layer has parameters that are fused
_COMMITTED = "commit_success.txt"  # Orbax's

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class FileChecksum:
    """Size in bytes and sha256 of one file."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.bytes, int) or not isinstance(self.sha256, str):
            raise ValueError(f"{self}")


@dataclasses.dataclass(frozen=True)
class ArrayChecksum:
    """dtype, shape, size in bytes, and sha256 of the array's little-endian C-order bytes."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.shape, STORED_DTYPES[self.dtype])

    @classmethod
    def of(cls, array: np.ndarray) -> "ArrayChecksum":
        """The checksum of a C-order array."""
        sha256 = hashlib.sha256(as_bytes(array)).hexdigest()
        return cls(array.dtype.name, array.shape, array.nbytes, sha256)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ArrayChecksum":
        """Raises ValueError, KeyError or TypeError for a malformed one."""
        checksum = cls(**{**values, "shape": tuple(values["shape"])})
        if checksum.spec.nbytes != checksum.bytes:
            raise ValueError(f"{checksum}")
        return checksum


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Checksums by relative path, and by path of the array."""

    files: Mapping[str, FileChecksum]
    arrays: Mapping[str, ArrayChecksum]

    def write(self, directory: Path) -> None:
        """Writes and synchronizes MANIFEST.json; the last file of a checkpoint."""
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
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
            if version != VERSION:
                raise CheckpointError(
                    f"{directory} has format version {version}, this library reads {VERSION}. "
                    "Convert it again from its source, or for a newer one run: pip install "
                    "--upgrade paligemma-jax"
                )
            return cls(
                files={name: FileChecksum(**v) for name, v in content["files"].items()},
                arrays={n: ArrayChecksum.from_json(v) for n, v in content["arrays"].items()},
            )
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            unreadable = f"no readable {MANIFEST}, so it is unfinished"
            problem = unreadable if isinstance(e, OSError) else f"a damaged {MANIFEST}"
            raise CheckpointError(
                f"{directory} has {problem}. Convert again into a new directory: paligemma convert "
                "SOURCE TARGET"
            ) from e

    def missing_files(self, directory: Path) -> list[str]:
        """One line for each file that is missing or has another size."""
        problems = []
        for name, checksum in self.files.items():
            path = directory / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != checksum.bytes:
                problems.append(f"{name} has {path.stat().st_size:,} bytes of {checksum.bytes:,}")
        return problems

    def changed_files(self, directory: Path, names: Iterable[str] | None = None) -> list[str]:
        """One line for each file, or each of `names` that is listed, with another sha256."""
        names = self.files if names is None else [name for name in names if name in self.files]
        return checksum_problems(directory, {name: self.files[name].sha256 for name in names})


def checksum_files(directory: Path) -> dict[str, FileChecksum]:
    """Checksums of every file under `directory`, by relative path with "/"."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): FileChecksum(path.stat().st_size, file_sha256(path))
        for path in paths
    }


def write_arrays(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> dict[str, ArrayChecksum]:
    """Writes (path, C-order array) pairs as they come, and their checksums meanwhile.

    In a run of several processes each of them calls this with the same path and arrays, since Orbax
    lets all wait for all; the first one writes. Raises OSError for any failure to write; errors of
    `arrays` pass through.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly compress, and loading is faster
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = _IN_FLIGHT
    checksums: dict[str, ArrayChecksum] = {}
    with quiet(), context, concurrent.futures.ThreadPoolExecutor(1) as pool:
        for group in _batches(arrays, lambda item: item[1].nbytes):
            found = pool.map(ArrayChecksum.of, [array for _, array in group])
            with as_os_error():
                ocp.partial.save(str(path), nest(dict(group)))  # writes files of its own
            checksums |= zip((name for name, _ in group), found, strict=True)
            del group  # or it would stay while the next one is read
        with as_os_error():
            ocp.partial.finalize(str(path))
    mark = path / _COMMITTED
    # Its presence counts, not its content, which names the directory it was written in.
    if jax.process_index() == 0 and mark.exists():
        mark.write_bytes(b"")
    return checksums


class _ArrayReader:
    """Reads arrays that Orbax stored as `specs` say; raises OSError where they are not.

    Every call of Orbax takes 20 ms, so small arrays come together: `groups` are those that are
    read one after the other. Of some groups at once each may be at its own place.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], groups: Iterable[Sequence[str]]
    ):
        self._path = str(path.absolute())  # Orbax takes no other
        self._specs = specs
        self._batches: dict[str, tuple[str, ...]] = {}
        small: list[str] = []
        for group in groups:
            if sum(specs[name].nbytes for name in group) < _CHUNK:
                small += group
            else:
                self._add(group)
        self._add(small)
        self._stored: dict[str, Any] | None = None
        self._loaded: dict[tuple[str, ...], dict[str, np.ndarray]] = {}

    def _add(self, names: Sequence[str]) -> None:
        for batch in _batches(names, lambda name: self._specs[name].nbytes):
            self._batches |= dict.fromkeys(batch, tuple(batch))

    def read(self, name: str) -> np.ndarray:
        """One array, as it is stored."""
        batch = self._batches[name]
        if name not in self._loaded.get(batch, {}):
            self._loaded.pop(batch, None)
            if len(self._loaded) >= _GROUPS:  # the oldest was left in the middle
                self._loaded.pop(next(iter(self._loaded)))
            self._loaded[batch] = self._load(batch)
        array = self._loaded[batch].pop(name)
        if not self._loaded[batch]:
            del self._loaded[batch]
        return array

    def _load(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        import orbax.checkpoint.experimental.v1 as ocp

        context = ocp.Context()
        context.pytree.loading.partial_load = True
        context.memory.read_concurrent_bytes = _IN_FLIGHT
        with quiet(), context, as_os_error():
            if self._stored is None:
                self._stored = flatten(ocp.metadata(self._path).metadata)
            for name in names:
                stored, spec = self._stored[name], self._specs[name]
                # Orbax would cast any stored dtype to any wanted one in silence.
                if (stored.shape, stored.dtype) != (spec.shape, spec.dtype):
                    found = f"{stored.dtype} {stored.shape}"
                    raise OSError(errno.EIO, f"{name} is {found}, not {spec.dtype} {spec.shape}")
            return flatten(ocp.load(self._path, nest({n: self._stored[n] for n in names})))


def _batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in batches of at least `_CHUNK` bytes."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        del item
        if total >= _CHUNK:
            full, batch, total = batch, [], 0
            yield full
            del full
    if batch:
        yield batch


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """Turns the many kinds that Orbax and tensorstore raise into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        if "RESOURCE_EXHAUSTED" in str(e):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from e
        first = (str(e).strip().splitlines() or [""])[0]
        raise OSError(errno.EIO, f"{type(e).__name__}: {first}"[:200]) from e


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax from logging: pages for an error that is raised all the same, and advice."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def damaged(path: Path, problems: Sequence[str]) -> CheckpointError:
    """The error for a checkpoint that is not as it was written."""
    return CheckpointError(
        f"{path} is damaged {problem_list(problems)}\n"
        "Copy it again, or convert again: paligemma convert SOURCE TARGET"
    )


def _stored_names(name: str, shape: Shape) -> list[str]:
    """The arrays of one tensor: a number follows its path where it has chunks."""
    if not name.startswith(LAYER_STACKS) and name not in EMBEDDING_TABLES:
        return [name]
    return [f"{name}/{number}" for number in range(len(chunk_shapes(name, shape)))]


def arrays_to_store(source: TensorSource) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a native checkpoint by their paths, read one by one."""
    for group in tensor_groups(source.specs):
        names = zip(*(_stored_names(n, source.specs[n].shape) for n in group), strict=True)
        for stored, arrays in zip(names, read_chunks(source, group), strict=True):
            yield from zip(stored, arrays, strict=True)
            del arrays  # or they would stay while the next ones are read


@dataclasses.dataclass(frozen=True)
class Orbax(CheckpointFormat):
    """The native format: keeps everything, loads fastest, and carries checksums of all arrays."""

    name: ClassVar[str] = "orbax"
    quantized: ClassVar[bool] = True

    def write(self, target: Path, source: TensorSource, metadata: CheckpointMetadata) -> None:
        config = {**source.config.to_dict(), "origin": dict(metadata.origin)}
        if metadata.quantization is not None:
            config[QUANTIZATION] = metadata.quantization.to_dict()
        for name, values in ((CONFIG, config), (PROCESSOR, dict(metadata.processor))):
            (target / name).write_text(json.dumps(values, indent=1) + "\n")
        (target / TOKENIZER).write_bytes(metadata.tokenizer or b"")
        if metadata.mask_codec is not None:
            (target / MASK_CODEC).write_bytes(metadata.mask_codec)
        checksums = write_arrays(target / PARAMS, arrays_to_store(source))
        sync_tree(target)
        Manifest(checksum_files(target), checksums).write(target)


class OrbaxReader(CheckpointReader):
    """A native checkpoint.

    With `verify`, the small files' checksums are compared on opening, and each array's on reading
    it. A given `config` replaces the stored one and must match the arrays.
    """

    kind = "orbax"

    def __init__(self, path: Path, config: PaliGemmaConfig | None = None, *, verify: bool = True):
        self.path = path.absolute()
        self._manifest = Manifest.read(path)
        self._verify = verify
        problems = self._manifest.missing_files(path)
        if verify and not problems:
            small = (CONFIG, PROCESSOR, TOKENIZER, MASK_CODEC)
            problems = self._manifest.changed_files(path, small)
        if problems:
            raise damaged(path, problems)
        values = read_json(path / CONFIG)
        self.origin = values.pop("origin", {})
        self.quantization = _read_quantization(path, values.pop(QUANTIZATION, None))
        try:
            self.config = config or PaliGemmaConfig.from_dict(values)
        except ConfigError as e:
            raise CheckpointError(
                f"{path / CONFIG} is not a valid configuration: {e} Convert again: paligemma "
                "convert SOURCE TARGET"
            ) from e
        self._processor = read_json(path / PROCESSOR)
        self._stored = {name: checksum.spec for name, checksum in self._manifest.arrays.items()}
        self._match()
        # Reading and checking overlap.
        self._pool = concurrent.futures.ThreadPoolExecutor(1)

    def _match(self) -> None:
        quantized = quantized_specs(self.config, self.quantization)
        shapes = {name: spec.shape for name, spec in quantized.items()}
        shapes |= float_shapes(self.config, self.quantization)
        self._names = {name: _stored_names(name, shape) for name, shape in shapes.items()}
        expected: dict[str, Shape | None] = {}
        wrong: list[str] = []
        for name, shape in shapes.items():
            wanted = quantized[name].dtype if name in quantized else None
            expected |= zip(self._names[name], chunk_shapes(name, shape), strict=True)
            for part in self._names[name]:
                found = self._stored[part].dtype if part in self._stored else None
                right = found == wanted if wanted is not None else str(found) in FLOATS
                if found is not None and not right:
                    model = wanted or "a float"
                    wrong.append(f"dtype       {part}: checkpoint {found}, model {model}")
        found_shapes = {name: spec.shape for name, spec in self._stored.items()}
        problems = shape_problems(found_shapes, expected) + wrong
        if problems:
            raise validation_error(self.path, problems)
        self.specs = {name: TensorSpec(shape, self._dtype(name)) for name, shape in shapes.items()}
        self._arrays = _ArrayReader(self.path / PARAMS, self._stored, self._names.values())

    def _dtype(self, name: str) -> np.dtype:
        kinds = {self._stored[part].dtype for part in self._names[name]}
        return kinds.pop() if len(kinds) == 1 else FLOATS["float32"]

    def processor_settings(self) -> dict[str, Any]:
        return self._processor

    def read_tokenizer(self) -> bytes:
        """The SentencePiece model."""
        return (self.path / TOKENIZER).read_bytes()

    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        stored = self._names[name][index]
        try:
            array = self._arrays.read(stored)
        except OSError as e:
            raise damaged(self.path, [f"{stored} cannot be read: {e.strerror}"]) from e
        checksum = self._pool.submit(ArrayChecksum.of, array) if self._verify else None
        copy_into(out, array)
        if checksum and checksum.result() != self._manifest.arrays[stored]:
            raise damaged(self.path, [f"{stored} was changed (sha256 differs)"])

    def close(self) -> None:
        self._pool.shutdown()


def _read_quantization(path: Path, names: Any) -> QuantizationConfig | None:
    try:
        if names is not None and not isinstance(names, dict):
            raise ValueError(f"{names!r} is not a format for each kind of weight")
        return None if names is None else QuantizationConfig.from_dict(names)
    except ValueError as e:
        raise CheckpointError(
            f"{path / CONFIG} has an unknown {QUANTIZATION}: {e} A newer library may "
            "know it: pip install --upgrade paligemma-jax"
        ) from e


def is_native(path: Path) -> bool:
    """Whether a directory is a native checkpoint, or a part of one."""
    return (path / MANIFEST).exists() or (path / PARAMS).is_dir()
