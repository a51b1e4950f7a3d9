"""The mask codec's file."""

import io
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.errors import CheckpointError
from paligemma_jax.models.mask_vae import MaskVAE, MaskVAEConfig
from paligemma_jax.weights.mask_vae import CODEBOOK, load_mask_vae, mask_vae_bytes
from tests.goldens import GOLDEN

FILE = GOLDEN / "big_vision" / "mask_vae.params.npz"


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, allow_pickle=False, **arrays)
    return path


def test_what_is_written_is_what_was_read(arrays):
    written = np.load(io.BytesIO(mask_vae_bytes(load_mask_vae(FILE))))
    assert set(written.files) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)


def test_half_precision_is_read(tmp_path: Path):
    model = MaskVAE(MaskVAEConfig(embedding_dim=8), rngs=nnx.Rngs(0))
    path = tmp_path / "codec.npz"
    path.write_bytes(mask_vae_bytes(model, "float16"))
    loaded = load_mask_vae(path)
    assert loaded.config == model.config
    pairs = zip(jax.tree.leaves(nnx.state(loaded)), jax.tree.leaves(nnx.state(model)), strict=True)
    for read, was in pairs:
        np.testing.assert_allclose(read, was, atol=1e-3)


def test_all_problems_are_named(tmp_path: Path, arrays):
    broken = dict(arrays)
    del broken["encoder.0.bias"]
    broken["extra"] = np.zeros(3, np.float32)
    broken["decoder.12.bias"] = np.zeros(2, np.float32)
    with pytest.raises(CheckpointError) as error:
        load_mask_vae(write(tmp_path / "broken.npz", broken))
    message = str(error.value)
    assert "3 problems" in message
    assert "missing     encoder.0.bias" in message
    assert "unexpected  extra" in message
    assert "shape       decoder.12.bias: checkpoint (2,), model (1,)" in message


@pytest.mark.parametrize("shape", [(64, 64), (128,), (256, 64)])
def test_codebook_of_another_size(tmp_path: Path, arrays, shape):
    other = {**arrays, CODEBOOK: np.zeros(shape, np.float32)}
    with pytest.raises(CheckpointError, match="codebook.*128"):
        load_mask_vae(write(tmp_path / "other.npz", other))


def test_values_that_are_not_finite(tmp_path: Path, arrays):
    bad = {**arrays, "decoder.0.bias": np.full_like(arrays["decoder.0.bias"], np.nan)}
    with pytest.raises(CheckpointError, match=r"decoder\.0\.bias.*not finite"):
        load_mask_vae(write(tmp_path / "bad.npz", bad))


def test_no_file_and_no_archive(tmp_path: Path):
    with pytest.raises(CheckpointError, match="There is no mask codec"):
        load_mask_vae(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(CheckpointError):
        load_mask_vae(tmp_path / "text.npz")
