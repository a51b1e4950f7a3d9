"""SigLIP image encoder (arXiv 2303.15343) and the projection to the language model's width.

Letters: B batch, P patches, D encoder width, F MLP width, N heads, H head width, W decoder width,
L layers. Layers are stacked on a leading L axis, or a list after `unstack_layers`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from paligemma_jax.config import SigLIPConfig
from paligemma_jax.models.attention import in_query_blocks
from paligemma_jax.models.layers import DType, LayerNorm, Remat, init_stacked, scan_layers
from paligemma_jax.models.linear import Dense


class SelfAttention(nnx.Module):
    """Unmasked multi-head attention with biases."""

    def __init__(self, config: SigLIPConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        heads, kw = (config.num_heads, config.head_dim), dict(dtype=dtype, param_dtype=param_dtype)
        self.q = Dense((config.width,), heads, rngs=rngs, **kw)
        self.k = Dense((config.width,), heads, rngs=rngs, **kw)
        self.v = Dense((config.width,), heads, rngs=rngs, **kw)
        self.out = Dense(heads, (config.width,), rngs=rngs, **kw)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        q = q * q.shape[-1] ** -0.5
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

        def attend(q: jax.Array, start: jax.Array) -> jax.Array:
            q = q.swapaxes(1, 2)
            logits = jnp.einsum("BNPH,BNQH->BNPQ", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
            mixed = jnp.einsum("BNPQ,BNQH->BNPH", weights, v, preferred_element_type=jnp.float32)
            return mixed.astype(x.dtype).swapaxes(1, 2)

        return self.out(in_query_blocks(attend, q, k.shape[2]))


class MLP(nnx.Module):
    """Two dense layers with a tanh-approximated GELU between."""

    def __init__(self, config: SigLIPConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.fc1 = Dense((config.width,), (config.mlp_dim,), **kw)
        self.fc2 = Dense((config.mlp_dim,), (config.width,), **kw)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class Block(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: SigLIPConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.norm1 = LayerNorm(config.width, **kw)
        self.attn = SelfAttention(config, rngs=rngs, **kw)
        self.norm2 = LayerNorm(config.width, **kw)
        self.mlp = MLP(config, rngs=rngs, **kw)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nnx.Module):
    """Cuts the image into patches, row by row, and projects each: a convolution of stride p."""

    def __init__(self, config: SigLIPConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        p = config.patch_size
        self.patch_size = p
        dense = Dense((p, p, 3), (config.width,), rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.kernel, self.bias, self.dtype = dense.kernel, dense.bias, dtype

    def __call__(self, images: Float[Array, "B height width 3"]) -> Float[Array, "B P D"]:
        # A convolution rather than one matmul over patches: its float32 error is the smaller.
        x = jax.lax.conv_general_dilated(
            images.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            window_strides=(self.patch_size, self.patch_size),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.float32,
        )
        x = x + self.bias[...].astype(jnp.float32)
        return x.reshape(x.shape[0], -1, x.shape[-1]).astype(self.dtype)


class SigLIP(nnx.Module):
    """Image encoder plus `head`, the linear projection to the decoder's width."""

    def __init__(
        self,
        config: SigLIPConfig,
        out_width: int,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.config = config
        self.patch_embed = PatchEmbed(config, rngs=rngs, **kw)
        self.pos_embed = nnx.Param(
            (jax.random.normal(rngs.params(), (1, config.num_patches, config.width))
             / config.width**0.5).astype(param_dtype)
        )  # fmt: skip
        self.blocks: Block | nnx.List[Block] = init_stacked(
            lambda layer_rngs: Block(config, rngs=layer_rngs, **kw), config.depth, rngs
        )
        self.norm = LayerNorm(config.width, **kw)
        self.head = Dense((config.width,), (out_width,), rngs=rngs, **kw)

    def encode(
        self, images: Float[Array, "B height width 3"], remat: Remat = "none"
    ) -> Float[Array, "B P D"]:
        """Normalized output of the last layer, before the projection; images in [-1, 1]."""
        x = self.patch_embed(images)
        x = x + self.pos_embed[...].astype(x.dtype)
        x = scan_layers(self.blocks, lambda block, h, _: block(h), x, remat)
        return self.norm(x)

    def __call__(
        self, images: Float[Array, "B height width 3"], remat: Remat = "none"
    ) -> Float[Array, "B P W"]:
        """Image tokens in the decoder's width; images in [-1, 1]."""
        return self.head(self.encode(images, remat))
