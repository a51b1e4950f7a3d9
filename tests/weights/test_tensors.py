"""Arrays, shapes and problems: what all formats share."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from scipy import ndimage

from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.weights.tensors import (
    BFLOAT16,
    FLOATS,
    aligned_empty,
    as_bytes,
    as_float_dtype,
    copy_into,
    expected_shapes,
    resample_position_embeddings,
    shape_problems,
    validation_error,
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


def test_one_error_names_every_problem():
    found = {"zzz/w": (3,), "kv_einsum/w": (3, 2, 1, 32, 4), "same": (1,)}
    expected = {"q_einsum/w": (3, 4, 32, 8), "kv_einsum/w": (3, 2, 1, 32, 8), "same": (1,)}
    error = validation_error("dir/model.npz", shape_problems(found, expected))
    assert isinstance(error, CheckpointError)
    assert str(error).splitlines()[:4] == [
        "Checkpoint dir/model.npz does not match the model (3 problems):",
        "  missing     q_einsum/w (3, 4, 32, 8)",
        "  unexpected  zzz/w (3,)",
        "  shape       kv_einsum/w: checkpoint (3, 2, 1, 32, 4), model (3, 2, 1, 32, 8)",
    ]
    many = validation_error("x", [f"missing     {n}" for n in range(30)])
    assert "(30 problems)" in str(many) and "... 10 more ..." in str(many)
    assert shape_problems(expected, expected) == []


def test_a_renamed_tensor_is_pointed_to():
    (missing, unexpected) = shape_problems(
        {"llm/layers/mlp/lineer": (2,)}, {"llm/layers/mlp/linear": (2,)}
    )
    assert missing.endswith("(is it llm/layers/mlp/lineer?)")
    assert unexpected.startswith("unexpected")


def test_an_untied_head_is_a_parameter(pg1: PaliGemmaConfig):
    llm = dataclasses.replace(pg1.llm, tie_embeddings=False)
    untied = expected_shapes(dataclasses.replace(pg1, llm=llm))
    assert untied["llm/lm_head/w"] == (llm.vocab_size, llm.width)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("paligemma-3b-pt-224", 2_923_335_408),
        ("paligemma-3b-pt-896", 2_927_759_088),
        ("paligemma2-3b-pt-224", 3_032_094_960),
        ("paligemma2-10b-pt-448", 9_663_294_192),
        ("paligemma2-28b-pt-896", 27_654_615_792),
    ],
)
def test_published_parameter_counts(name: str, count: int):
    shapes = expected_shapes(VARIANTS[name])
    assert sum(math.prod(shape) for shape in shapes.values()) == count
    assert len(shapes) == (34 if "paligemma2" in name else 32)


def embeddings(grid: int, dtype: np.typing.DTypeLike = np.float32) -> np.ndarray:
    values = np.random.default_rng(grid).standard_normal((1, grid * grid, 6))
    return values.astype(dtype)


@pytest.mark.parametrize(("old", "new"), [(16, 32), (16, 64), (32, 16), (3, 7), (4, 1), (1, 3)])
def test_equals_big_visions_formula(old: int, new: int):
    source = embeddings(old)
    # In scipy's default mode a coordinate rounded to just beyond the edge gives zeros.
    factors = (new / old, new / old, 1)
    zoomed = np.asarray(ndimage.zoom(source.reshape(old, old, 6), factors, order=1, mode="nearest"))
    ours = resample_position_embeddings(source, new * new)
    assert ours.shape == (1, new * new, 6) and ours.dtype == np.float32
    np.testing.assert_allclose(ours.reshape(zoomed.shape), zoomed, rtol=0, atol=2e-6)


def test_an_equal_size_changes_nothing():
    source = embeddings(5, BFLOAT16)
    assert resample_position_embeddings(source, 25) is source


def test_corners_and_dtype_stay():
    source = embeddings(4, BFLOAT16)
    ours = resample_position_embeddings(source, 81)
    assert ours.dtype == BFLOAT16
    corners = [ours[0, i] for i in (0, 8, 72, 80)]
    assert all((a == b).all() for a, b in zip(corners, source[0, [0, 3, 12, 15]], strict=True))


def test_grids_must_be_square():
    with pytest.raises(CheckpointError, match="16 position embeddings cannot become 12"):
        resample_position_embeddings(embeddings(4), 12)
