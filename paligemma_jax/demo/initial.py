"""Initial weights that know that space is smooth: sine-cosine position and coordinate embeddings.

Both are ordinary trained parameters afterwards; the start only saves a small model the many steps
it would need to find out that patch 9 is under patch 1 and <loc0500> beside <loc0501>.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.demo.objective import NUM_LOC
from paligemma_jax.models.paligemma import PaliGemma


def initial_model(config: PaliGemmaConfig, loc_start: int, seed: int) -> PaliGemma:
    """A float32 model with random weights and structured position and <loc> embeddings."""
    model = PaliGemma(config, rngs=nnx.Rngs(seed))
    side = config.img.image_size // config.img.patch_size
    model.img.pos_embed[...] = jnp.asarray(_grid_waves(side, config.img.width)[None])
    table = np.array(model.llm.embedder.input_embedding[...])
    width = config.llm.width
    waves = _waves(np.linspace(0.0, 1.0, NUM_LOC), width, max_cycles=40.0)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    loc = slice(loc_start, loc_start + NUM_LOC)
    # As long as a random row, mostly shared with the neighbouring bins.
    table[loc] = 0.9 * waves @ rotation * np.sqrt(2.0 / width) + 0.3 * table[loc]
    model.llm.embedder.input_embedding[...] = jnp.asarray(table)
    return model


def _waves(x: np.ndarray, width: int, max_cycles: float) -> np.ndarray:
    """[len(x), width] sines and cosines of x in 0..1, from half a cycle to `max_cycles`."""
    cycles = np.geomspace(0.5, max_cycles, width // 2)
    angle = 2 * np.pi * x[:, None] * cycles
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def _grid_waves(side: int, width: int) -> np.ndarray:
    """[side * side, width]: half the features for the row, half for the column."""
    axis = _waves((np.arange(side) + 0.5) / side, width // 2, max_cycles=side / 2)
    rows, columns = np.repeat(axis, side, axis=0), np.tile(axis, (side, 1))
    return np.concatenate([rows, columns], axis=1) * 0.5
