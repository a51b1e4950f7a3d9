import numpy as np
import pytest
from scipy import ndimage

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.tensors import BFLOAT16, resample_position_embeddings


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
