"""Pages full of words: nothing is asked about them, the encoder learns to read from them."""

import numpy as np

from paligemma_jax.demo.geometry import Box
from paligemma_jax.demo.scene import PLATE_EDGE, Text, sample_text

_TRIES = 16  # words thrown at a page; about five find room


def sample_page(rng: np.random.Generator) -> tuple[Text, ...]:
    """Samples words and numbers that do not overlap, signs included."""
    texts: list[Text] = []
    for _ in range(_TRIES):
        text = sample_text(rng, large=False)
        if not any(_touch(text.box, other.box) for other in texts):
            texts.append(text)
    return tuple(texts)


def _touch(a: Box, b: Box) -> bool:
    room = 2 * PLATE_EDGE
    return a[0] < b[2] + room and b[0] < a[2] + room and a[1] < b[3] + room and b[1] < a[3] + room
