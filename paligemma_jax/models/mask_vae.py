"""The mask codec of PaliGemma's `<seg>` tokens: a VQ-VAE of 64 x 64 masks.

After Ning et al., "All in Tokens" (arXiv 2301.02229), with the layers and names of the file that
PaliGemma was published with. A mask becomes a 4 x 4 grid of 16 codes out of K = 128.

Letters: B masks, K codes, E width of a code, D channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from paligemma_jax.models.layers import normal_init

MASK_SIDE = 64  # pixels
GRID_SIDE = 4  # codes
NUM_CODES = GRID_SIDE * GRID_SIDE
_ENCODER_WIDTHS = (16, 32, 64, 128)
_DECODER_WIDTHS = (128, 64, 32, 16)
_WIDTH = 128  # of the residual blocks
_WINDOW = 4  # of the convolutions that halve or double the side


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskVAEConfig:
    """`num_embeddings` K is 128 for PaliGemma; `embedding_dim` E is what the file holds."""

    num_embeddings: int = 128
    embedding_dim: int = 512


class Conv(nnx.Module):
    """A convolution with bias, "same" padding; `kernel` is [h, w, in, out]."""

    def __init__(self, window: int, features_in: int, features: int, *, rngs: nnx.Rngs):
        shape = (window, window, features_in, features)
        fan_in = window * window * features_in
        self.kernel = nnx.Param(normal_init(rngs.params(), shape, fan_in, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,)))

    def __call__(self, x: Float[Array, "B h w i"], stride: int = 1) -> Float[Array, "B h2 w2 o"]:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...]


class Doubling(nnx.Module):
    """A transposed convolution of stride 2; `kernel` is [4, 4, in, out], as it is scattered.

    Run as one ordinary convolution that gives the four pixels each input pixel becomes. Written as
    a transposed one, XLA takes twice as long on CPUs.
    """

    def __init__(self, features_in: int, features: int, *, rngs: nnx.Rngs):
        shape = (_WINDOW, _WINDOW, features_in, features)
        self.kernel = nnx.Param(normal_init(rngs.params(), shape, 4 * features_in, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,)))

    def __call__(self, x: Float[Array, "B n n i"]) -> Float[Array, "B n2 n2 o"]:
        batch, side, _, features_in = x.shape
        kernel = self.kernel[...]
        # Input row n + d - 1 reaches output row 2 n + r through row 3 + r - 2 d of the kernel.
        spread = jnp.zeros((3, 3, features_in, 2, 2, kernel.shape[-1]), kernel.dtype)
        reach = [(d, r, 3 + r - 2 * d) for d in range(3) for r in range(2)]
        reach = [(d, r, h) for d, r, h in reach if 0 <= h < _WINDOW]
        for down, row, h in reach:
            for across, column, w in reach:
                spread = spread.at[down, across, :, row, column].set(kernel[h, w])
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, spread.reshape(3, 3, features_in, -1), (1, 1), "SAME", dimension_numbers=layout
        )
        y = y.reshape(batch, side, side, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(batch, 2 * side, 2 * side, -1) + self.bias[...]


class Residual(nnx.Module):
    """x + conv1x1(relu(conv3x3(relu(conv3x3(x)))))."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = Conv(3, _WIDTH, _WIDTH, rngs=rngs)
        self.second = Conv(3, _WIDTH, _WIDTH, rngs=rngs)
        self.last = Conv(1, _WIDTH, _WIDTH, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        return x + self.last(jax.nn.relu(self.second(jax.nn.relu(self.first(x)))))


class MaskEncoder(nnx.Module):
    """Masks in [-1, 1] to a 4 x 4 grid of vectors, before they are quantized to codes."""

    def __init__(self, config: MaskVAEConfig, *, rngs: nnx.Rngs):
        widths = (1, *_ENCODER_WIDTHS)
        self.halvings = nnx.List(
            [
                Conv(_WINDOW, before, after, rngs=rngs)
                for before, after in zip(widths[:-1], widths[1:], strict=True)
            ]
        )
        self.residuals = nnx.List([Residual(rngs=rngs) for _ in range(2)])
        self.out = Conv(1, _WIDTH, config.embedding_dim, rngs=rngs)

    def __call__(self, masks: Float[Array, "B 64 64 1"]) -> Float[Array, "B 4 4 E"]:
        x = masks
        for conv in self.halvings:
            x = jax.nn.relu(conv(x, stride=2))
        for block in self.residuals:
            x = block(x)
        return self.out(x)


class MaskDecoder(nnx.Module):
    """A 4 x 4 grid of code vectors to masks."""

    def __init__(self, config: MaskVAEConfig, *, rngs: nnx.Rngs):
        self.into = Conv(1, config.embedding_dim, _WIDTH, rngs=rngs)
        self.residuals = nnx.List([Residual(rngs=rngs) for _ in range(2)])
        widths = (_WIDTH, *_DECODER_WIDTHS)
        self.doublings = nnx.List(
            [
                Doubling(before, after, rngs=rngs)
                for before, after in zip(widths[:-1], widths[1:], strict=True)
            ]
        )
        self.out = Conv(1, _DECODER_WIDTHS[-1], 1, rngs=rngs)

    def __call__(self, vectors: Float[Array, "B 4 4 E"]) -> Float[Array, "B 64 64 1"]:
        x = jax.nn.relu(self.into(vectors))
        for block in self.residuals:
            x = block(x)
        for doubling in self.doublings:
            x = jax.nn.relu(doubling(x))
        return self.out(x)


class MaskVAE(nnx.Module):
    """Encoder, codebook [K, E] and decoder. Everything is float32.

    Args:
      config: size of the codebook.
      rngs: source of the random initial weights.
    """

    def __init__(self, config: MaskVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = MaskEncoder(config, rngs=rngs)
        shape = (config.num_embeddings, config.embedding_dim)
        self.codebook = nnx.Param(
            normal_init(rngs.params(), shape, config.embedding_dim, "float32")
        )
        self.decoder = MaskDecoder(config, rngs=rngs)

    def encode(self, masks: Float[Array, "B 64 64 1"]) -> Int[Array, "B 16"]:
        """Codes of masks with values in [0, 1] (1 is inside), row by row of the grid."""
        return self.nearest(self.encoder(2.0 * (masks - 0.5)))

    def nearest(self, vectors: Float[Array, "B 4 4 E"]) -> Int[Array, "B 16"]:
        """The codes whose vectors are nearest (squared Euclidean distance)."""
        flat = vectors.reshape(vectors.shape[0], NUM_CODES, 1, -1)
        distance = jnp.sum((flat - self.codebook[...]) ** 2, axis=-1)
        return jnp.argmin(distance, axis=-1).astype(jnp.int32)

    def decode(self, codes: Int[Array, "B 16"]) -> Float[Array, "B 64 64 1"]:
        """Masks of codes 0..K-1; nominally in [-1, 1], above 0 is inside."""
        vectors = self.codebook[...][codes]
        return self.decoder(vectors.reshape(codes.shape[0], GRID_SIDE, GRID_SIDE, -1))
