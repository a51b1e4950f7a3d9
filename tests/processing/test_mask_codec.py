"""Masks to codes and back, for any number of masks."""

import numpy as np
import pytest
from flax import nnx

from paligemma_jax.errors import InvalidMaskError
from paligemma_jax.models.mask_vae import MaskVAE, MaskVAEConfig
from paligemma_jax.processing import masks as mask_codec
from paligemma_jax.processing.masks import MaskCodec


@pytest.fixture(scope="module")
def codec() -> MaskCodec:
    return MaskCodec(MaskVAE(MaskVAEConfig(embedding_dim=8), rngs=nnx.Rngs(0)))


def test_each_mask_as_alone(codec: MaskCodec):
    rng = np.random.default_rng(0)
    codes = rng.integers(128, size=(70, 16))
    masks = codec.decode(codes)
    assert masks.shape == (70, 64, 64) and masks.dtype == np.float32
    np.testing.assert_allclose(masks[66], codec.decode(codes[66:67])[0], atol=1e-5)
    crops = rng.random((5, 64, 64)).astype(np.float32)
    encoded = codec.encode(crops)
    assert encoded.shape == (5, 16) and encoded.dtype == np.int32
    np.testing.assert_array_equal(encoded[3], codec.encode(crops[3:4])[0])


def test_nothing(codec: MaskCodec):
    assert codec.decode(np.zeros((0, 16))).shape == (0, 64, 64)
    assert codec.decode(np.array([])).shape == (0, 64, 64)
    assert codec.encode(np.zeros((0, 64, 64))).shape == (0, 16)


def test_few_programs_for_many_numbers_of_masks(codec: MaskCodec):
    programs = getattr(mask_codec._decode, "_cache_size")  # noqa: B009
    before = programs()
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 13, 64, 65, 130):
        codec.decode(np.zeros((count, 16), np.int32))
    assert programs() - before <= 7  # 1, 2, 4, ... 64


@pytest.mark.parametrize("codes", [np.full((1, 16), 128), np.full((1, 16), -1), np.zeros((2, 15))])
def test_codes_that_do_not_fit(codec: MaskCodec, codes):
    with pytest.raises(InvalidMaskError, match="do not fit"):
        codec.decode(codes)


def test_crops_that_do_not_fit(codec: MaskCodec):
    with pytest.raises(InvalidMaskError, match="crop_for_codec"):
        codec.encode(np.zeros((1, 32, 32)))
