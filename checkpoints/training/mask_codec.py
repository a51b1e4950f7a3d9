"""Trains the demo world's mask codec: `python -m checkpoints.training.mask_codec --target FILE`.

The architecture is the published one with a narrower codebook. Vector quantization as in van den
Oord et al. (arXiv 1711.00937); the codebook starts as k-means of what an encoder that was trained
without it produces, so that no code is lost.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from checkpoints.training.prompts import codec_crops
from paligemma_jax.demo.scene import HELD_OUT, TRAINING
from paligemma_jax.models.mask_vae import MaskVAE, MaskVAEConfig
from paligemma_jax.weights.mask_vae import mask_vae_bytes

CONFIG = MaskVAEConfig(num_embeddings=128, embedding_dim=32)
BATCH, PLAIN_STEPS, CODED_STEPS = 48, 300, 1_200
LEARNING_RATE, COMMITMENT = 1.5e-3, 0.25
CROPS = 6_144

Loss = Callable[[MaskVAE, jax.Array], jax.Array]


def plain_loss(model: MaskVAE, masks: jax.Array) -> jax.Array:
    """Mean squared error without quantization; masks f32[B, 64, 64, 1] in [-1, 1]."""
    return jnp.mean((model.decoder(model.encoder(masks)) - masks) ** 2)


def coded_loss(model: MaskVAE, masks: jax.Array) -> jax.Array:
    """Mean squared error through the codes, straight-through, and the codebook's two terms."""
    vectors = model.encoder(masks)
    codes = model.nearest(jax.lax.stop_gradient(vectors))
    coded = model.codebook[...][codes].reshape(vectors.shape)
    decoded = model.decoder(vectors + jax.lax.stop_gradient(coded - vectors))
    moved = jnp.mean((coded - jax.lax.stop_gradient(vectors)) ** 2)
    committed = jnp.mean((vectors - jax.lax.stop_gradient(coded)) ** 2)
    return jnp.mean((decoded - masks) ** 2) + moved + COMMITMENT * committed


@functools.partial(jax.jit, static_argnames=("loss", "optimizer"))
def update(
    model: Any, state: Any, masks: jax.Array, loss: Loss, optimizer: Any
) -> tuple[Any, Any, jax.Array]:
    """One step of Adam on a MaskVAE."""
    value, grads = jax.value_and_grad(loss)(model, masks)
    updates, state = optimizer.update(grads, state, model)
    return optax.apply_updates(model, updates), state, value


def k_means(points: np.ndarray, count: int, rng: np.random.Generator, rounds: int = 12):
    """f32[count, E] centres of f32[n, E] points; a centre nobody is near is drawn again."""
    centres = points[rng.choice(len(points), count, replace=False)]
    for _ in range(rounds):
        nearest = np.argmin((centres**2).sum(1)[None] - 2 * points @ centres.T, axis=1)
        for k in range(count):
            mine = points[nearest == k]
            centres[k] = mine.mean(0) if len(mine) else points[rng.integers(len(points))]
    return centres


def reconstruction_iou(model: MaskVAE, crops: np.ndarray) -> float:
    """Mean IoU of masks f32[n, 64, 64] in [0, 1] and what their codes decode to."""
    through = jax.jit(lambda model, x: model.decode(model.encode(x)))
    ious = []
    for start in range(0, len(crops), 64):
        batch = crops[start : start + 64]
        decoded = np.asarray(through(model, jnp.asarray(batch)[..., None]))[..., 0] > 0
        truth = batch > 0.5
        ious += list((decoded & truth).sum((1, 2)) / (decoded | truth).sum((1, 2)))
    return float(np.mean(ious))


def train(seed: int, plain_steps: int, coded_steps: int) -> MaskVAE:
    """Trains from scratch; the same seed gives the same codec on the same machine."""
    rng = np.random.default_rng(seed)
    crops = codec_crops(seed, TRAINING, CROPS)
    held_out = codec_crops(seed, HELD_OUT, 256)
    model = MaskVAE(CONFIG, rngs=nnx.Rngs(seed))

    def run(model: MaskVAE, loss: Loss, steps: int) -> MaskVAE:
        optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, 50, steps))
        state = optimizer.init(cast(Any, model))
        for step in range(1, steps + 1):
            batch = crops[rng.integers(len(crops), size=BATCH)]
            masks = jnp.asarray(2 * batch - 1)[..., None]
            model, state, value = update(model, state, masks, loss, optimizer)
            if step % 100 == 0 or step == steps:
                print(f"{loss.__name__} {step:5d} {float(value):.4f}", flush=True)
        return model

    model = run(model, plain_loss, plain_steps)
    sample = crops[rng.integers(len(crops), size=512)]
    vectors = np.asarray(jax.jit(lambda m, x: m.encoder(x))(model, 2 * sample[..., None] - 1))
    points = vectors.reshape(-1, CONFIG.embedding_dim)
    model.codebook.set_value(jnp.asarray(k_means(points, CONFIG.num_embeddings, rng)))
    model = run(model, coded_loss, coded_steps)
    codes = np.asarray(jax.jit(lambda m, x: m.encode(x))(model, held_out[..., None]))
    print(f"{len(np.unique(codes))} of {CONFIG.num_embeddings} codes in use")
    print(f"held-out reconstruction IoU {reconstruction_iou(model, held_out):.4f}")
    return model


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True, help="npz file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain-steps", type=int, default=PLAIN_STEPS)
    parser.add_argument("--coded-steps", type=int, default=CODED_STEPS)
    args = parser.parse_args()
    began = time.monotonic()
    model = train(args.seed, args.plain_steps, args.coded_steps)
    beside = args.target.with_name(f".{args.target.name}.partial")
    beside.write_bytes(mask_vae_bytes(model, "float16"))
    beside.replace(args.target)
    print(f"wrote {args.target} in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
