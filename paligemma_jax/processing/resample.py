"""Antialiased bilinear resizing with TensorFlow's float32 arithmetic, operation by operation.

big_vision resizes with `tf.image.resize(method="bilinear", antialias=True)` and truncates the
result to uint8, so a difference in the last bit can cost a whole grey level. Weights and sums are
formed in the same order and precision therefore (kernel `ScaleAndTranslate`, triangle filter, CPU).
"""

import numpy as np

Span = tuple[int, np.ndarray]  # first source index, float32 weights of it and the following ones


def triangle_spans(input_size: int, output_size: int) -> list[Span]:
    """For each output position, the first source index and the normalised triangle weights.

    The filter is one source pixel wide when enlarging and one output pixel wide when shrinking.
    """
    one, half = np.float32(1), np.float32(0.5)
    inverse_scale = one / (np.float32(output_size) / np.float32(input_size))
    radius = max(inverse_scale, one)
    spans = []
    for position in range(output_size):
        center = (np.float32(position) + half) * inverse_scale
        first = min(max(int(np.ceil(center - radius - half)), 0), input_size - 1)
        last = min(max(int(np.floor(center + radius - half)), 0), input_size - 1)
        sources = np.arange(first, last + 1, dtype=np.float32)
        distance = np.abs((sources + half - center) * (one / radius))
        weights = np.maximum(one - distance, np.float32(0))
        total = np.add.accumulate(weights)[-1]  # np.sum adds pairwise; TensorFlow does not
        spans.append((first, weights * (one / total)))
    return spans


def _resample_rows(pixels: np.ndarray, output_size: int) -> np.ndarray:
    """Resamples axis 0 of any real array to float32[output_size, ...]."""
    output = np.zeros((output_size, *pixels.shape[1:]), np.float32)
    product = np.empty(pixels.shape[1:], np.float32)
    for row, (first, weights) in zip(output, triangle_spans(len(pixels), output_size), strict=True):
        for source, weight in zip(pixels[first:], weights, strict=False):
            np.multiply(source, weight, out=product, dtype=np.float32)
            row += product
    return output


def resize_bilinear_antialias(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes [H, W, C] to float32 [height, width, C]; values stay on the scale of the input.

    Equals TensorFlow's CPU result bit for bit on the golden pictures. Memory beyond the input and
    the result: one float32 [height, W, C].
    """
    rows = _resample_rows(pixels, height)
    columns = _resample_rows(np.ascontiguousarray(rows.transpose(1, 0, 2)), width)
    return np.ascontiguousarray(columns.transpose(1, 0, 2))
