"""One random batch to train on: the same for every implementation.

Letters: B rows, H W pixels, T text tokens, the last one's target included.
"""

import dataclasses

import numpy as np

from paligemma_jax.benchmark.inputs import random_prompts
from paligemma_jax.config import PaliGemmaConfig


@dataclasses.dataclass(frozen=True)
class TrainInputs:
    """Pictures f32[B, H, W, 3], tokens i32[B, T] without padding, and how many are prompt."""

    images: np.ndarray
    tokens: np.ndarray
    prefix: int

    @property
    def in_suffix(self) -> np.ndarray:
        """bool[B, T]: the tokens to learn."""
        return np.broadcast_to(np.arange(self.tokens.shape[1]) >= self.prefix, self.tokens.shape)


def random_examples(config: PaliGemmaConfig, batch: int, text: int, suffix: int) -> TrainInputs:
    """`batch` pictures, each with `text` tokens for the model to read, and `suffix` to learn.

    Rows have equally many tokens, so that the mean over examples (ours) is the mean over tokens
    (Hugging Face's).
    """
    images, tokens = random_prompts(config, batch, text + 1)
    return TrainInputs(images, tokens, text + 1 - suffix)
