"""Random pictures and prompts: the same for every implementation."""

import numpy as np

from paligemma_jax.config import PaliGemmaConfig

PROMPT = 32  # tokens


def random_images(config: PaliGemmaConfig, batch: int) -> np.ndarray:
    """f32[B, H, W, 3] in [-1, 1]."""
    size = config.img.image_size
    pixels = np.random.default_rng(batch).uniform(-1, 1, (batch, size, size, 3))
    return pixels.astype(np.float32)


def random_prompts(
    config: PaliGemmaConfig, batch: int, length: int = PROMPT
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, and tokens i32[B, length] that begin with the begin-of-sequence token."""
    last = min(config.llm.vocab_size, 250_000)  # above are <loc> and <seg>
    tokens = np.random.default_rng(batch + length).integers(3, last, (batch, length))
    tokens[:, 0] = 2
    return random_images(config, batch), tokens.astype(np.int32)
