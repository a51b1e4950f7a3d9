import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.image import (
    BICUBIC,
    BILINEAR,
    ImagePreprocessing,
    resize_bilinear_antialias,
    triangle_spans,
)


@pytest.mark.parametrize("name", ["cow_down", "lilly_down", "up", "tall"])
def test_big_vision_golden_bit_for_bit(golden, name):
    with np.load(golden / "resize.golden.npz") as arrays:
        pixels, wanted = arrays[f"{name}/input"], arrays[f"{name}/output"]
    result = ImagePreprocessing(len(wanted), BILINEAR)(pixels)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("method", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (14, 14), (5, 90)])
def test_any_size(method, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    result = ImagePreprocessing(14, method)(pixels)
    assert result.shape == (14, 14, 3) and result.dtype == np.float32
    assert -1 <= result.min() and result.max() <= 1
    if shape == (1, 1):
        # TensorFlow's weights sum to 1 - 2**-24 in places, and truncation then costs a grey level.
        np.testing.assert_allclose(result, np.broadcast_to(result[0, 0], result.shape), atol=0.008)
    if shape == (14, 14):
        np.testing.assert_allclose(result, pixels / 127.5 - 1, atol=1e-6)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_spans_lie_inside_and_sum_to_one(input_size, output_size):
    spans = triangle_spans(input_size, output_size)
    assert len(spans) == output_size
    for first, weights in spans:
        assert first >= 0 and first + len(weights) <= input_size
        assert weights.dtype == np.float32 and weights.min() >= 0
        assert abs(weights.sum() - 1) < 1e-6


def test_resize_is_separable_and_linear():
    pixels = np.random.default_rng(1).random((9, 7, 2)).astype(np.float32)
    turned = resize_bilinear_antialias(pixels.transpose(1, 0, 2), 5, 4).transpose(1, 0, 2)
    resized = resize_bilinear_antialias(pixels, 4, 5)
    np.testing.assert_allclose(resized, turned, atol=1e-6)
    np.testing.assert_allclose(resize_bilinear_antialias(2 * pixels, 4, 5), 2 * resized, atol=1e-6)


def test_bicubic_is_pillows(golden):
    with np.load(golden / "resize.golden.npz") as arrays:
        image = Image.fromarray(arrays["cow_down/input"])
    resized = np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC))
    result = ImagePreprocessing(28, BICUBIC)(image)
    np.testing.assert_allclose(result, resized / 127.5 - 1, atol=1e-6)


def test_dict_round_trip():
    for method in (BILINEAR, BICUBIC):
        settings_ = ImagePreprocessing(448, method)
        assert (
            ImagePreprocessing.from_dict(json.loads(json.dumps(settings_.to_dict()))) == settings_
        )
    assert ImagePreprocessing(224).to_dict() == {
        "size": 224,
        "method": "bilinear-antialias-truncated",
    }


@pytest.mark.parametrize("values", [{}, {"size": 28}, {"size": 28, "method": "nearest"}])
def test_bad_settings(values):
    with pytest.raises(ConfigError, match="bicubic-pil|lacks"):
        ImagePreprocessing.from_dict(values)


@pytest.mark.parametrize("size", [0, -1, 2.5, "224"])
def test_bad_size(size):
    with pytest.raises(ConfigError, match="1 pixel or more"):
        ImagePreprocessing(size)
