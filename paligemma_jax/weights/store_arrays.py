"""The arrays of a store: how parameters are cut into them, and reading them with their digests."""

import concurrent.futures
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.arrays import FLOATS
from paligemma_jax.weights.manifest import STACKED, Manifest, digest_array
from paligemma_jax.weights.orbax_tree import TreeReader
from paligemma_jax.weights.source import (
    Fill,
    Shape,
    TensorSpec,
    fill_from,
    is_split,
    piece_shapes,
    split,
)
from paligemma_jax.weights.strict import find_problems, misfit, require_fit

PARAMS = "params"


def stored_names(name: str, shape: Shape) -> list[str]:
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
    shapes: Mapping[str, Shape],
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
        floats: Mapping[str, Shape],
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
        self, path: Path, manifest: Manifest, shapes: Mapping[str, Shape], *, verify: bool
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
