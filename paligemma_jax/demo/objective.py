"""The demo model's loss: cross-entropy on answers, coordinates smoothed over nearby bins.

Letters: I pictures, R rows, n pictures a row, T text tokens, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.demo.patches import NUM_CHARACTERS, NUM_COLOURS, NUM_KINDS
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.training.losses import token_nll

GROUPS = ("short", "long", "pair")
NUM_LOC = 1024
PROBE_SIZES = (NUM_KINDS, NUM_COLOURS, NUM_CHARACTERS, 4)


def soft_targets(tokenizer: Tokenizer, sigma: float) -> np.ndarray:
    """Target distribution f32[V, V] a token: itself, or for <loc> a Gaussian of `sigma` bins."""
    table = np.eye(tokenizer.vocab_size, dtype=np.float32)
    bins = np.arange(NUM_LOC)
    near = np.exp(-0.5 * ((bins[:, None] - bins[None]) / sigma) ** 2)
    loc = slice(tokenizer.loc_start, tokenizer.loc_start + NUM_LOC)
    table[loc, loc] = near / near.sum(axis=1, keepdims=True)
    return table


def group_logits(model: PaliGemma, image_tokens: jax.Array, group: Any) -> jax.Array:
    """Teacher-forced logits [R, T-1, V] of one group of rows, from encoded pictures [I, P, W]."""
    rows = group["text"].shape[0]
    images = image_tokens[group["image"]].reshape(rows, -1, image_tokens.shape[-1])
    return model.forward(images, group["text"][:, :-1], group["mask_ar"][:, :-1])


def patch_features(model: PaliGemma, pictures: jax.Array) -> jax.Array:
    """Encoder output [I, P, D] of uint8 pictures [I, size, size, 3]."""
    return model.img.encode(pictures.astype(jnp.float32) / 127.5 - 1.0)


def patch_loss(probe: Any, features: jax.Array, patches: Any) -> jax.Array:
    """How badly a linear probe reads kind, colour, character and box off the patch features."""
    out = features @ probe["kernel"] + probe["bias"]
    kind, colour, character, box = jnp.split(out, np.cumsum(PROBE_SIZES)[:-1], axis=-1)
    total = jnp.zeros(())
    for logits, target in (
        (kind, patches["kind"]),
        (colour, patches["colour"]),
        (character, patches["character"]),
    ):
        nll = token_nll(logits, target)
        weight = jnp.where(target > 0, 4.0, 1.0)  # most patches show nothing
        total += jnp.sum(nll * weight) / jnp.sum(weight)
    shown = (patches["kind"] > 0)[..., None]
    distance = jnp.abs(box - patches["box"]) * shown
    return total + 10.0 * jnp.sum(distance) / jnp.maximum(4 * jnp.sum(shown), 1)


def loss(
    model: PaliGemma,
    probe: Any,
    batch: Any,
    targets: jax.Array,
    pair_weight: float,
    patch_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss a supervised token, in nats, summed over groups; the patches'; and each part."""
    features = patch_features(model, batch["pictures"])
    image_tokens = model.img.head(features)
    parts = {"patch": patch_loss(probe, features, batch["patches"])}
    for name in GROUPS:
        group = batch[name]
        logp = jax.nn.log_softmax(group_logits(model, image_tokens, group))
        nll = -jnp.sum(targets[group["text"][:, 1:]] * logp, axis=-1)
        mask = group["mask_loss"][:, 1:]
        parts[name] = jnp.sum(nll * mask) / jnp.sum(mask)
    answers = parts["short"] + parts["long"] + pair_weight * parts["pair"]
    return answers + patch_weight * parts["patch"], parts


def row_correct(
    model: PaliGemma, batch: Any, loc_start: int, loc_tolerance: int
) -> dict[str, jax.Array]:
    """Whether each row's answer is right under teacher forcing, bool[R] a group.

    A <loc> counts as right within `loc_tolerance` bins: a quick look while training, not a metric.
    """
    image_tokens = model.img.head(patch_features(model, batch["pictures"]))
    out = {}
    for name in GROUPS:
        group = batch[name]
        guess = jnp.argmax(group_logits(model, image_tokens, group), axis=-1)
        target = group["text"][:, 1:]
        is_loc = (target >= loc_start) & (target < loc_start + NUM_LOC)
        right = jnp.where(is_loc, jnp.abs(guess - target) <= loc_tolerance, guess == target)
        out[name] = jnp.all(right | (group["mask_loss"][:, 1:] == 0), axis=1)
    return out
