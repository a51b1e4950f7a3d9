"""Images and prompts into the key-value cache, whether the images are encoded already or not.

Letters: B prompts, N pictures a prompt, P patches a picture, T prompt tokens, W decoder width, V
vocabulary.
"""

import functools

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.devices import by_rows
from paligemma_jax.generation.loop import prefill
from paligemma_jax.models.backend import on_cpu
from paligemma_jax.models.cache import KVCache
from paligemma_jax.models.jitted import Jitted
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.batch import Batch


def read_prefix(
    model: PaliGemma, batch: Batch, image_tokens: jax.Array | None = None, *, room: int = 0
) -> tuple[jax.Array, KVCache]:
    """Logits f32[B, V] after each prompt, and a cache with room for `room` tokens more.

    `image_tokens` f[B, N * P, W] stand in for the pictures of `batch`, which are then not looked
    at. Raises ConfigError if they are for another number of prompts.
    """
    rows, length = batch.tokens.shape
    place = by_rows(model)
    text = [place(x) for x in (batch.tokens, batch.mask_ar, batch.mask_input)]
    if image_tokens is not None:
        if image_tokens.shape[0] != rows:
            raise ConfigError(
                f"Image tokens of {image_tokens.shape[0]} prompts do not go with {rows} rows. One "
                "of each a row fits. Make them with: stack(encoded, batch.tokens.shape[0])"
            )
        slots = slots_for(image_tokens.shape[1] + length + room)
        return prefill_encoded(model, place(image_tokens), *text, slots=slots)
    images = batch.images
    if images is None:
        size = model.config.img.image_size
        images = np.zeros((rows, 0, size, size, 3), np.float32)
    slots = slots_for(images.shape[1] * model.config.img.num_patches + length + room)
    return prefill(model, place(images), *text, slots=slots)


def slots_for(tokens: int) -> int:
    """Cache slots for so many tokens: on accelerators a multiple of 256.

    For other sizes XLA on GPUs copies the whole cache into a padded one at every step.
    """
    return tokens if on_cpu() else -(-tokens // 256) * 256


@functools.partial(Jitted, static_argnames=("slots",))
def prefill_encoded(
    model: PaliGemma,
    image_tokens: Float[Array, "B NP W"],
    tokens: Int[Array, "B T"],
    mask_ar: Int[Array, "B T"],
    mask_input: Bool[Array, "B T"],
    slots: int,
) -> tuple[Float[Array, "B V"], KVCache]:
    """As `loop.prefill`, with images that are encoded already."""
    return model.prefill(image_tokens, tokens, mask_ar, mask_input, slots)
