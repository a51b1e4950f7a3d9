"""Suffix losses with big_vision's semantics, without a one-hot of vocabulary size.

Letters: B batch, T tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num


def token_nll(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], label_smoothing: float = 0.0
) -> Float[Array, "*B"]:
    """Cross-entropy in nats; smoothing spreads over the V - 1 other classes (big_vision 4.1)."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    on_target = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    if not label_smoothing:
        return -on_target
    other = label_smoothing / (logits.shape[-1] - 1)
    return -((1.0 - label_smoothing - other) * on_target + other * jnp.sum(logp, axis=-1))


def per_example_loss(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    mask_loss: Num[Array, "B T"],
    label_smoothing: float = 0.0,
) -> Float[Array, " B"]:
    """Mean over each example's supervised tokens, in nats; the batch loss is the mean of these."""
    nll = token_nll(logits, targets, label_smoothing) * mask_loss
    return jnp.sum(nll, axis=1) / jnp.maximum(jnp.sum(mask_loss, axis=1), 1)
