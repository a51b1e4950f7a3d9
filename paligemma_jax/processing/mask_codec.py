"""Masks <-> the codes of `<seg>` tokens, for any number of masks at once.

Letters: n masks.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.errors import InvalidMaskError
from paligemma_jax.models.mask_vae import MASK_SIDE, NUM_CODES, MaskVAE
from paligemma_jax.processing.buckets import bucket

_MOST = 32  # masks that go through the network together: bounds memory, and programs to compile


@dataclasses.dataclass(frozen=True)
class MaskCodec:
    """The VQ-VAE behind `<seg000>` .. `<seg127>`, numpy in and out."""

    model: MaskVAE

    def encode(self, crops: np.ndarray) -> np.ndarray:
        """Codes i32[n, 16] of masks f32[n, 64, 64] in [0, 1], each cut to its object's box.

        Raises InvalidMaskError for another shape.
        """
        crops = np.asarray(crops, np.float32)
        if crops.ndim != 3 or crops.shape[1:] != (MASK_SIDE, MASK_SIDE):
            raise InvalidMaskError(
                f"Masks of shape {list(crops.shape)} do not fit. [n, {MASK_SIDE}, {MASK_SIDE}] "
                "fits. Cut masks to their boxes with crop_for_codec."
            )
        pieces = [_encode(self.model, part)[:real] for part, real in _parts(crops[..., None])]
        return np.concatenate([np.zeros((0, NUM_CODES), np.int32), *map(np.asarray, pieces)])

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Masks f32[n, 64, 64], nominally in [0, 1] with 0.5 at the edge, of codes i32[n, 16].

        Raises InvalidMaskError for another shape or codes that are not of the codebook.
        """
        codes = np.asarray(codes)
        codes = codes if codes.size else np.zeros((0, NUM_CODES), np.int32)
        count = self.model.config.num_embeddings
        fits = codes.ndim == 2 and codes.shape[1] == NUM_CODES
        if not fits or (codes.size and not 0 <= codes.min() <= codes.max() < count):
            raise InvalidMaskError(
                f"Codes of shape {list(codes.shape)} do not fit. [n, {NUM_CODES}] whole numbers "
                f"from 0 to {count - 1} fit, as <seg> tokens give them."
            )
        pieces = [_decode(self.model, part)[:real] for part, real in _parts(codes.astype(np.int32))]
        empty = np.zeros((0, MASK_SIDE, MASK_SIDE), np.float32)
        return np.concatenate([empty, *map(np.asarray, pieces)])


def _parts(rows: np.ndarray) -> list[tuple[jax.Array, int]]:
    """Pieces of at most 32 rows, filled up to a power of two, and how many rows are real."""
    parts = []
    for start in range(0, len(rows), _MOST):
        piece = rows[start : start + _MOST]
        room = min(bucket(len(piece), 1), _MOST) - len(piece)
        filled = np.pad(piece, [(0, room)] + [(0, 0)] * (rows.ndim - 1))
        parts.append((jnp.asarray(filled), len(piece)))
    return parts


@jax.jit
def _encode(model: MaskVAE, masks: jax.Array) -> jax.Array:
    return model.encode(masks)


@jax.jit
def _decode(model: MaskVAE, codes: jax.Array) -> jax.Array:
    return model.decode(codes)[..., 0] * 0.5 + 0.5
