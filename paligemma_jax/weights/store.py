"""The self-contained store that `paligemma convert` writes: weights, config, processor, tokenizer.

config.json      the architecture
processor.json   how pictures and prompts are prepared
tokenizer.model  the SentencePiece model
mask_codec.npz   the codec of <seg> tokens, where there is one
params/          the arrays, by orbax: each layer of a parameter by itself
MANIFEST.json    sha256 of every file and array, written last

Weights of few bits are stored as they are multiplied, in PATH/matrix/values and PATH/matrix/scale.
PATH is that of the unrolled model ("llm/layers/attn/qkv"); those of 4 bits are `Pairs`.

The digests a stored checkpoint carries: sha256 of every file and of every array.

Array data on disk has no checksum of its own: a flipped bit would load as another weight.

Trees of arrays on disk, by orbax, written and read a group at a time.

No other module knows orbax. It is imported when it is used, since that takes a while.

The arrays of a store: how parameters are cut into them, and reading them with their digests.

sha256 of a directory's files in SHA256SUMS, as the sha256sum program reads and writes it.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.filesystem import read_json, sync_tree
from paligemma_jax.models.paligemma import flatten, nest
from paligemma_jax.models.quantization_config import QuantizationConfig
from paligemma_jax.weights.companions import MASK_CODEC, Contents
from paligemma_jax.weights.tensors import (
    FLOATS,
    NUMBERS,
    Fill,
    SourceShape,
    TensorSpec,
    Weights,
    as_bytes,
    families,
    fill_from,
    find_problems,
    is_split,
    misfit,
    piece_shapes,
    read_pieces,
    require_fit,
    split,
)
from paligemma_jax.weights.views import few_bit_specs, float_shapes

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


_CHUNK = 64 << 20  # bytes; what reading and writing need beyond the array itself is a few of these
_IN_FLIGHT = 2 * _CHUNK
_GROUPS = 4  # that may be read in turn: more than a layer has parameters that are fused
_COMMITTED = "commit_success.txt"  # orbax's

T = TypeVar("T")


def write_tree(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> dict[str, ArrayDigest]:
    """Writes (path, C-order array) pairs as they come, and digests them meanwhile.

    In a run of several processes each of them calls this with the same path and arrays, since orbax
    lets all wait for all; the first one writes. Raises OSError for any failure to write; errors of
    `arrays` pass through.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly compress, and loading is faster
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = _IN_FLIGHT
    digests: dict[str, ArrayDigest] = {}
    with quiet(), context, concurrent.futures.ThreadPoolExecutor(1) as pool:
        for group in _group(arrays, lambda item: item[1].nbytes):
            found = pool.map(digest_array, [array for _, array in group])
            with as_os_error():
                ocp.partial.save(str(path), nest(dict(group)))  # writes files of its own
            digests |= zip((name for name, _ in group), found, strict=True)
            del group  # or it would stay while the next one is read
        with as_os_error():
            ocp.partial.finalize(str(path))
    mark = path / _COMMITTED
    # It is looked for, not read, and names the directory it was written in.
    if jax.process_index() == 0 and mark.exists():
        mark.write_bytes(b"")
    return digests


class TreeReader:
    """Reads arrays of a tree that are stored as `specs` say; raises OSError where they are not.

    Every call of orbax takes 20 ms, so small arrays come together: `families` are those that are
    read one after the other. Of some families at once each may be at its own place.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], families: Iterable[Sequence[str]]
    ):
        self._path = str(path.absolute())  # orbax takes no other
        self._specs = specs
        self._groups: dict[str, tuple[str, ...]] = {}
        for group in _groups(families, lambda name: specs[name].nbytes):
            self._groups |= dict.fromkeys(group, tuple(group))
        self._stored: dict[str, Any] | None = None
        self._loaded: dict[tuple[tuple[str, ...], np.dtype], dict[str, np.ndarray]] = {}

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """One array, cast chunk by chunk if `dtype` is not the stored one."""
        key = self._groups[name], dtype
        if name not in self._loaded.get(key, {}):
            self._loaded.pop(key, None)
            if len(self._loaded) >= _GROUPS:  # the oldest was left in the middle
                self._loaded.pop(next(iter(self._loaded)))
            self._loaded[key] = self._load(key[0], dtype)
        array = self._loaded[key].pop(name)
        if not self._loaded[key]:
            del self._loaded[key]
        return array

    def _load(self, names: Sequence[str], dtype: np.dtype) -> dict[str, np.ndarray]:
        import orbax.checkpoint.experimental.v1 as ocp

        context = ocp.Context()
        context.pytree.loading.partial_load = True
        context.memory.read_concurrent_bytes = _IN_FLIGHT
        with quiet(), context, as_os_error():
            if self._stored is None:
                self._stored = flatten(ocp.metadata(self._path).metadata)
            wanted = {name: self._as_stored(name, dtype) for name in names}
            return flatten(ocp.load(self._path, nest(wanted)))

    def _as_stored(self, name: str, dtype: np.dtype) -> Any:
        """orbax's description of one array, with the dtype to cast to."""
        stored, spec = (self._stored or {})[name], self._specs[name]
        # orbax would cast any stored dtype to any wanted one in silence.
        if (stored.shape, stored.dtype) != (spec.shape, spec.dtype):
            found = f"{stored.dtype} {stored.shape}"
            raise OSError(errno.EIO, f"{name} is {found}, not {spec.dtype} {spec.shape}")
        return dataclasses.replace(stored, dtype=dtype)


def _groups(families: Iterable[Sequence[str]], size: Callable[[str], int]) -> Iterator[list[str]]:
    """Names in groups of at least `_CHUNK` bytes; only small families share one."""
    small: list[str] = []
    for family in families:
        if sum(map(size, family)) < _CHUNK:
            small += family
        else:
            yield from _group(family, size)
    yield from _group(small, size)


def _group(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in groups of at least `_CHUNK` bytes."""
    group: list[T] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        del item
        if total >= _CHUNK:
            full, group, total = group, [], 0
            yield full
            del full
    if group:
        yield group


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """Turns the many kinds that orbax and tensorstore raise into OSError."""
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
    """Keeps orbax from logging: pages for an error that is raised all the same, and advice."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


PARAMS = "params"


def stored_names(name: str, shape: SourceShape) -> list[str]:
    """The arrays of one parameter: a number follows its path where it has pieces."""
    if not is_split(name):
        return [name]
    return [f"{name}/{number}" for number in range(len(piece_shapes(name, shape)))]


@runtime_checkable
class StoredArrays(Protocol):
    """The parameters of a store, in whatever arrays they are."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        """See `Weights`."""
        ...


def open_arrays(
    path: Path,
    manifest: Manifest,
    shapes: Mapping[str, SourceShape],
    few_bits: Mapping[str, TensorSpec],
    *,
    verify: bool,
) -> StoredArrays:
    """The arrays of a store; raises CheckpointError that names all that do not fit.

    Floats must have `shapes`, and values and scales of few bits be as `few_bits` says.
    """
    if manifest.version == STACKED:
        return StackedArrays(path, manifest, shapes, verify=verify)
    return PieceArrays(path, manifest, shapes, few_bits, verify=verify)


class PieceArrays:
    """An array for each piece of a parameter."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        floats: Mapping[str, SourceShape],
        few_bits: Mapping[str, TensorSpec],
        *,
        verify: bool,
    ):
        self._path = path
        self._manifest = manifest
        self._verify = verify
        shapes = {name: spec.shape for name, spec in few_bits.items()} | dict(floats)
        self._names = {name: stored_names(name, shape) for name, shape in shapes.items()}
        stored = {name: digest.spec for name, digest in manifest.arrays.items()}
        expected = {
            part: piece
            for name, shape in shapes.items()
            for part, piece in zip(self._names[name], piece_shapes(name, shape), strict=True)
        }
        problems = find_problems({name: spec.shape for name, spec in stored.items()}, expected)
        dtypes = {
            part: few_bits[n].dtype if n in few_bits else None
            for n in shapes
            for part in self._names[n]
        }
        problems += _find_other_dtypes(stored, dtypes)
        if problems:
            raise misfit(path, problems)
        self._stored = stored
        self.specs = {name: TensorSpec(shape, self._dtype(name)) for name, shape in shapes.items()}
        self._tree = TreeReader(path / PARAMS, stored, self._names.values())

    def _dtype(self, name: str) -> np.dtype:
        kinds = {self._stored[part].dtype for part in self._names[name]}
        return kinds.pop() if len(kinds) == 1 else FLOATS["float32"]

    @property
    def sliceable(self) -> "PieceArrays":
        """See `read_boxes`."""
        return self

    def read_box(
        self, name: str, number: int, box: tuple[slice, ...], dtype: np.dtype
    ) -> np.ndarray:
        """See `Sliceable`: the piece is read whole, for its digest, and no other."""
        part = self._names[name][number]
        read = functools.partial(self._tree.read, part, self._stored[part].dtype)
        array = read_or_raise(self._path, part, read)
        if self._verify and digest_array(array) != self._manifest.arrays[part]:
            raise damaged(self._path, [f"{part} was changed (sha256 differs)"])
        return array[box].astype(dtype, copy=False)

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            for part in self._names[name]:
                read = functools.partial(self._tree.read, part, self._stored[part].dtype)
                array = read_or_raise(self._path, part, read)
                digest = pool.submit(digest_array, array) if self._verify else None
                yield fill_from(array)
                if digest and digest.result() != self._manifest.arrays[part]:
                    raise damaged(self._path, [f"{part} was changed (sha256 differs)"])


def _find_other_dtypes(
    stored: Mapping[str, TensorSpec], expected: Mapping[str, np.dtype | None]
) -> list[str]:
    """A line for each array of another dtype; None stands for any float."""
    problems = []
    for name, wanted in expected.items():
        found = stored[name].dtype if name in stored else None
        if found is None or found == wanted or (wanted is None and found.name in FLOATS):
            continue
        problems.append(f"dtype       {name}: checkpoint {found}, model {wanted or 'a float'}")
    return problems


class StackedArrays:
    """One array for each parameter, its layers stacked: stores of version 1."""

    def __init__(
        self, path: Path, manifest: Manifest, shapes: Mapping[str, SourceShape], *, verify: bool
    ):
        self._path = path
        self._manifest = manifest
        self._verify = verify
        self.specs = {name: digest.spec for name, digest in manifest.arrays.items()}
        require_fit(path, {name: spec.shape for name, spec in self.specs.items()}, shapes)
        self._tree = TreeReader(path / PARAMS, self.specs, [[name] for name in self.specs])
        self._files_verified = not verify

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        stored = self.specs[name].dtype
        if dtype.itemsize < stored.itemsize:
            # The wide array is never whole in memory, where its digest could be taken.
            self._verify_files()
            yield from _pieces(name, self._load(name, dtype))
            return
        array = self._load(name, stored)
        if not self._verify:
            yield from _pieces(name, array)
            return
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            digest = pool.submit(digest_array, array)
            yield from _pieces(name, array)
            if digest.result() != self._manifest.arrays[name]:
                raise damaged(self._path, [f"{name} was changed (sha256 differs)"])

    def _load(self, name: str, dtype: np.dtype) -> np.ndarray:
        return read_or_raise(self._path, name, functools.partial(self._tree.read, name, dtype))

    def _verify_files(self) -> None:
        if not self._files_verified:
            problems = self._manifest.find_changed_files(self._path, f"{PARAMS}/")
            if problems:
                raise damaged(self._path, problems)
            self._files_verified = True


def read_or_raise(path: Path, name: str, read: Callable[[], np.ndarray]) -> np.ndarray:
    """What `read` gives; CheckpointError where it cannot."""
    try:
        return read()
    except OSError as e:
        raise damaged(path, [f"{name} cannot be read: {e.strerror}"]) from e


def _pieces(name: str, array: np.ndarray) -> Iterator[Fill]:
    for part in split(name, array):
        yield fill_from(part)


def damaged(path: Path, problems: list[str]) -> CheckpointError:
    """The error for a store that is not as it was written."""
    listing = "\n  ".join(problems)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return CheckpointError(
        f"{path} is damaged ({count}):\n"
        f"  {listing}\n"
        "A store exactly as it was converted fits. Copy it again, or convert again: paligemma "
        "convert SOURCE TARGET"
    )


QUANTIZATION = "quantization"  # in config.json: the format of each kind of weight
CONFIG, PROCESSOR, TOKENIZER = "config.json", "processor.json", "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class Orbax:
    """Our store; it keeps everything, loads fastest, and carries digests of all its arrays."""

    name: ClassVar[str] = "orbax"
    few_bits: ClassVar[bool] = True

    def is_file(self, target: Path) -> bool:
        """Whether `target` is to be one file."""
        return False

    def needs_tokenizer(self, target: Path) -> bool:
        """Whether a tokenizer goes along."""
        return True

    def check(self, target: Path, weights: Weights) -> None:
        """Raises for what cannot be written, before anything is."""

    def write(self, target: Path, weights: Weights, contents: Contents) -> None:
        """Writes into an empty directory, layer by layer."""
        quantization = contents.quantization
        settings: dict[str, dict[str, Any]] = {
            CONFIG: {**weights.config.to_dict(), "origin": dict(contents.origin)},
            PROCESSOR: dict(contents.processor),
        }
        if quantization is not None:
            settings[CONFIG][QUANTIZATION] = quantization.to_dict()
        for name, values in settings.items():
            (target / name).write_text(json.dumps(values, indent=1) + "\n")
        (target / TOKENIZER).write_bytes(contents.tokenizer or b"")
        if contents.mask_codec is not None:
            (target / MASK_CODEC).write_bytes(contents.mask_codec)
        digests = write_tree(target / PARAMS, arrays_to_store(weights))
        sync_tree(target)
        version = PIECES if quantization is None else FEW_BITS
        Manifest(digest_files(target), digests, version).write(target)


def arrays_to_store(weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a store by their paths, read one by one."""
    for family in families(weights.specs):
        names = [stored_names(name, weights.specs[name].shape) for name in family]
        pieces = read_pieces(weights, family)
        for parts, arrays in zip(zip(*names, strict=True), pieces, strict=True):
            yield from zip(parts, arrays, strict=True)
            del arrays  # or they would stay while the next ones are read


class StoreSource:
    """A store; see `Source`.

    With `verify`, the small files' digests are checked on opening, and each array's on reading it.
    A given `config` replaces the stored one and must fit the arrays.
    """

    kind = "store"

    def __init__(self, path: Path, config: PaliGemmaConfig | None = None, *, verify: bool = True):
        self.path = path.absolute()  # orbax takes no other
        manifest = Manifest.read(path)
        problems = manifest.find_lost_files(path)
        if verify and not problems:
            # Arrays are checked when they are read.
            for name in (CONFIG, PROCESSOR, TOKENIZER, MASK_CODEC):
                problems += manifest.find_changed_files(path, name)
        if problems:
            raise damaged(path, problems)
        values = read_json(path / CONFIG)
        self.origin: dict[str, Any] = values.pop("origin", {})
        self.quantization = _read_quantization(path, values.pop(QUANTIZATION, None))
        try:
            self.config = config or PaliGemmaConfig.from_dict(values)
        except ConfigError as e:
            raise CheckpointError(
                f"{path / CONFIG} does not fit: {e} The one that the conversion wrote fits. "
                "Convert again: paligemma convert SOURCE TARGET"
            ) from e
        self.processor: dict[str, Any] = read_json(path / PROCESSOR)
        shapes = float_shapes(self.config, self.quantization)
        few_bits = (
            {} if self.quantization is None else few_bit_specs(self.config, self.quantization)
        )
        self._arrays = open_arrays(self.path, manifest, shapes, few_bits, verify=verify)
        self.specs: dict[str, TensorSpec] = dict(self._arrays.specs)

    def read_tokenizer(self) -> bytes:
        """The SentencePiece model."""
        return (self.path / TOKENIZER).read_bytes()

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        return self._arrays.pieces(name, dtype)

    @property
    def sliceable(self) -> Any:
        """What reads one piece without the others, if it can be; see `read_boxes`."""
        return getattr(self._arrays, "sliceable", None)

    def close(self) -> None:
        """Nothing stays open between reads."""


def _read_quantization(path: Path, names: Any) -> QuantizationConfig | None:
    try:
        if names is not None and not isinstance(names, dict):
            raise ValueError(f"{names!r} is no format for each kind of weight")
        return None if names is None else QuantizationConfig.from_dict(names)
    except ValueError as e:
        raise CheckpointError(
            f"{path / CONFIG} does not fit: {QUANTIZATION}: {e} A newer library may "
            "know it: pip install --upgrade paligemma-jax"
        ) from e


def is_store(path: Path) -> bool:
    """Whether a directory is a store, or a part of one."""
    return (path / MANIFEST).exists() or (path / PARAMS).is_dir()


SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_digests(directory: Path) -> None:
    """Writes the digests of all files that are there."""
    lines = [f"{digest.sha256}  {name}\n" for name, digest in digest_files(directory).items()]
    (directory / SUMS).write_text("".join(lines))


def find_changed(directory: Path) -> list[str]:
    """A line for each file that is missing or changed; CheckpointError for a damaged list."""
    found = [_LINE.fullmatch(line) for line in (directory / SUMS).read_text().splitlines()]
    named = {line[2]: line[1] for line in found if line is not None}
    if not named or None in found or any(Path(n).is_absolute() or ".." in n for n in named):
        raise CheckpointError(
            f"{directory / SUMS} is no list of digests. One as sha256sum writes it fits. Write the "
            "directory again, or remove the list."
        )
    problems = []
    for name, sha256 in named.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif file_sha256(path) != sha256:
            problems.append(f"{name} was changed (sha256 differs)")
    return problems
