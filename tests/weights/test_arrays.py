import jax
import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.weights.tensors import (
    BFLOAT16,
    FLOATS,
    aligned_empty,
    as_bytes,
    as_float_dtype,
    copy_into,
)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_aligned_arrays_go_to_jax_without_a_copy(dtype: np.dtype):
    array = aligned_empty((3, 5, 7), dtype)
    assert array.shape == (3, 5, 7) and array.dtype == dtype and array.flags.c_contiguous
    assert array.ctypes.data % 64 == 0
    if dtype.itemsize <= 4:
        array[...] = 1
        placed = jax.device_put(array, jax.devices("cpu")[0])
        assert placed.unsafe_buffer_pointer() == array.ctypes.data


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16])
def test_copies_and_casts_from_any_axis_order(order: tuple[int, ...], dtype: np.dtype):
    source = np.random.default_rng(0).standard_normal((40, 33, 70)).astype(np.float32)
    expected = np.ascontiguousarray(source.transpose(order)).astype(dtype)
    for values in (source, source.astype(dtype)):
        target = aligned_empty(expected.shape, dtype)
        copy_into(target, values.transpose(order))
        assert as_bytes(target) == as_bytes(expected)


def test_only_floats_are_parameters():
    assert as_float_dtype("bfloat16") == BFLOAT16 == as_float_dtype(jax.numpy.bfloat16)
    with pytest.raises(ConfigError, match="int8 cannot be loaded"):
        as_float_dtype("int8")
