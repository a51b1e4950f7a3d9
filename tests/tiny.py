"""Models of a few thousand weights, and random inputs for them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.config import GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.models.paligemma import PaliGemma, abstract_params, from_params
from paligemma_jax.processing.processor import Batch

VOCAB = 64
EOS = 1
SIGLIP = SigLIPConfig(image_size=8, patch_size=4, width=12, depth=2, mlp_dim=20, num_heads=2)
GEMMA = GemmaConfig(
    width=16,
    depth=3,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=1,
    head_dim=8,
    query_scale=8**-0.5,
    vocab_size=VOCAB,
)
GEMMA2 = dataclasses.replace(
    GEMMA, num_kv_heads=2, post_norms=True, attn_logit_softcap=50.0, final_logit_softcap=30.0
)


def tiny_config(llm: GemmaConfig = GEMMA2, **changes: Any) -> PaliGemmaConfig:
    """A configuration of 4 patches an image; `changes` are fields of the decoder's."""
    return PaliGemmaConfig(img=SIGLIP, llm=dataclasses.replace(llm, **changes), text_length=16)


def random_model(
    config: PaliGemmaConfig, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> PaliGemma:
    """A model with every weight random, norms and biases too, so that none goes unnoticed."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        is_gain = path[0].key == "img" and path[-1].key == "scale"
        return jnp.asarray(is_gain + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    shapes = abstract_params(config, param_dtype)
    return from_params(config, jax.tree_util.tree_map_with_path(draw, shapes), dtype)


def random_images(rows: int, number: int = 1, seed: int = 0) -> np.ndarray:
    """f32[rows, number, 8, 8, 3] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    size = SIGLIP.image_size
    return rng.uniform(-1, 1, (rows, number, size, size, 3)).astype(np.float32)


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    """Pieces that are neither padding, EOS nor BOS."""
    return np.random.default_rng(seed).integers(3, VOCAB, shape).astype(np.int32)


def prompts(lengths: list[int], width: int, number_of_images: int = 1, seed: int = 0) -> Batch:
    """Random prompts of the given lengths, padded on the right to `width`."""
    place = np.arange(width)[None]
    real = place < np.array(lengths)[:, None]
    return Batch(
        images=random_images(len(lengths), number_of_images, seed),
        tokens=np.where(real, random_tokens(len(lengths), width, seed=seed), 0).astype(np.int32),
        mask_ar=(~real).astype(np.int32),
        mask_input=real,
    )
