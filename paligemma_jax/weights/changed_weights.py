"""Weights seen through a change: another dtype or resolution, watched, or refused if not finite."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.resample import resample_position_embeddings
from paligemma_jax.weights.source import (
    SCALE,
    VALUES,
    Fill,
    Progress,
    TensorSpec,
    Weights,
    fill_from,
    read_tensor,
)

POSITIONS = "img/pos_embed"
# Bits that are all set in infinities and NaNs: of the exponent, or in e4m3fn all but the sign.
_EXPONENT = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80, "float8_e4m3fn": 0x7F}
_BLOCK = 8 << 20  # elements


class Cast:
    """Weights of other dtypes, by their paths."""

    def __init__(self, weights: Weights, dtypes: Mapping[str, np.dtype]):
        self._weights = weights
        self.config = weights.config
        self.specs = {
            name: dataclasses.replace(spec, dtype=dtypes[name])
            for name, spec in weights.specs.items()
        }

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        return self._weights.pieces(name, dtype)


def cast_floats(weights: Weights, dtype: np.dtype) -> Weights:
    """Weights of another dtype; values and scales of few bits stay as they are."""
    return Cast(
        weights,
        {
            name: spec.dtype if name.endswith((VALUES, SCALE)) else dtype
            for name, spec in weights.specs.items()
        },
    )


class Resampled:
    """Weights for pictures of another size; raises CheckpointError, as the resampling does."""

    def __init__(self, weights: Weights, config: PaliGemmaConfig):
        self._weights = weights
        self.config = config
        spec = weights.specs[POSITIONS]
        shape = (1, config.img.num_patches, spec.shape[-1])
        self.specs = {**weights.specs, POSITIONS: TensorSpec(shape, spec.dtype)}

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        if name != POSITIONS:
            yield from self._weights.pieces(name, dtype)
            return
        stored = self._weights.specs[name].dtype
        wider = stored if stored.itemsize > dtype.itemsize else dtype
        array = read_tensor(self._weights, name, wider)
        array = resample_position_embeddings(array, self.config.img.num_patches)
        yield fill_from(array)


class Finite:
    """The same weights; CheckpointError at the first that is infinite or NaN.

    `what` names them in the message, and `stored` are their dtypes before they were cast.
    """

    def __init__(self, weights: Weights, what: str, stored: Mapping[str, TensorSpec]):
        self._weights = weights
        self._what = what
        self._stored = stored
        self.config = weights.config
        self.specs = weights.specs

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        for fill in self._weights.pieces(name, dtype):
            yield functools.partial(self._fill, name, fill)

    def _fill(self, name: str, fill: Fill, target: np.ndarray) -> None:
        with np.errstate(over="ignore"):  # it is told below, with the name
            fill(target)
        if is_finite(target):
            return
        if target.dtype != self._stored[name].dtype:
            raise CheckpointError(
                f"{name} of {self._what} has values that {target.dtype} cannot hold, or that are "
                "not finite. bfloat16 has the range of float32. Choose another dtype: "
                "dtype='bfloat16' (--dtype bfloat16)"
            )
        raise CheckpointError(
            f"{name} of {self._what} holds infinite values or NaN. Finite weights fit: the "
            "training that made them diverged. Take an earlier checkpoint."
        )


def is_finite(array: np.ndarray) -> bool:
    """Whether no value is infinite or NaN; of any strides, block by block."""
    if array.dtype.name not in _EXPONENT:
        return True  # integers
    bits = array.view(f"u{array.itemsize}").ravel(order="K")
    exponent = bits.dtype.type(_EXPONENT[array.dtype.name])
    return not any(
        np.any((bits[start : start + _BLOCK] & exponent) == exponent)
        for start in range(0, bits.size, _BLOCK)
    )


class Watched:
    """The same weights; `progress` hears of every piece that is read."""

    def __init__(self, weights: Weights, progress: Progress, total: int):
        self._weights = weights
        self._progress = progress
        self._total = total
        self._done = 0
        self.config = weights.config
        self.specs = weights.specs

    def pieces(self, name: str, dtype: np.dtype) -> Iterator[Fill]:
        for fill in self._weights.pieces(name, dtype):
            self._progress(name, self._done, self._total)
            yield functools.partial(self._fill, name, fill)

    def _fill(self, name: str, fill: Fill, target: np.ndarray) -> None:
        fill(target)
        self._done += target.size * self.specs[name].dtype.itemsize

    def finish(self) -> None:
        """All is done."""
        self._progress("", self._total, self._total)
