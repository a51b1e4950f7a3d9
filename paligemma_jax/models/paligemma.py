"""PaliGemma (arXiv 2407.07726): SigLIP image tokens and text tokens through one Gemma decoder.

Letters: B batch, N images an example, P patches an image, T text tokens, S cache slots, W decoder
width, V vocabulary, M attention masks (1, or 2 with a sliding window: even layers, odd layers).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.cache import KVCache
from paligemma_jax.models.dropout import Dropout
from paligemma_jax.models.gemma import Gemma, Seen
from paligemma_jax.models.layers import DType
from paligemma_jax.models.masks import Layer, PrefixMask, SlotMask
from paligemma_jax.models.paths import nest
from paligemma_jax.models.remat import Remat
from paligemma_jax.models.siglip import SigLIP
from paligemma_jax.models.skeleton import Skeleton, take_apart
from paligemma_jax.models.stacked import KEEP_ALL


class PaliGemma(nnx.Module):
    """Image encoder `img` and decoder `llm`; parameters under the same two names as in big_vision.

    Args:
      config: the architecture.
      rngs: source of the random initial weights.
      dtype: dtype of activations and of the key-value cache; norms, softmax, rotary angles and
        logits are float32 whatever it is.
      param_dtype: dtype of the weights.
    """

    def __init__(
        self,
        config: PaliGemmaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        self.config = config
        self.dtype = dtype
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.img = SigLIP(config.img, config.llm.width, **kw)
        self.llm = Gemma(config.llm, **kw)

    def split(self) -> tuple[Skeleton, dict[str, Any]]:
        """The functional form: the model without its arrays, and these in a plain nested dict.

            graphdef, params = model.split()
            logits = jax.jit(graphdef.apply)(params, images, tokens, mask_ar)
            image_tokens = graphdef.merge(params).encode_images(images)

        Nothing is copied. Parameters of a stacked model (`load_model`) have the names and shapes of
        a checkpoint: params["llm"]["layers"]["attn"]["q_einsum"]["w"]. Where layers stand one by
        one (`from_pretrained`), each has its number: params["llm"]["layers"]["0"]["attn"].
        """
        skeleton, arrays = take_apart(self)
        return skeleton, nest(arrays)

    def encode_images(
        self, images: Float[Array, "B *N height width 3"], remat: Remat = KEEP_ALL
    ) -> Float[Array, "B NP W"]:
        """Image tokens; several images an example ([B, N, height, width, 3]) are concatenated."""
        batch = images.shape[0]
        flat = images.reshape(-1, *images.shape[-3:])
        if flat.shape[0] == 0:  # a prompt without images
            return jnp.zeros((batch, 0, self.config.llm.width), self.dtype)
        tokens = self.img(flat, remat)
        return tokens.reshape(batch, -1, tokens.shape[-1])

    def __call__(
        self,
        images: Float[Array, "B *N height width 3"],
        tokens: Int[Array, "B T"],
        mask_ar: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """Logits f32 at every text position, teacher forced.

        Padding needs no mask: it comes last and `mask_ar` 1 hides it from what stands before.
        """
        return self.forward(self.encode_images(images), tokens, mask_ar)

    def forward(
        self,
        image_tokens: Float[Array, "B NP W"],
        tokens: Int[Array, "B T"],
        mask_ar: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """As `__call__`, from image tokens that are encoded already."""
        return self.llm.logits(self.hidden(image_tokens, tokens, mask_ar))

    def hidden(
        self,
        image_tokens: Float[Array, "B NP W"],
        tokens: Int[Array, "B T"],
        mask_ar: Int[Array, "B T"],
        dropout: Dropout | None = None,
        remat: Remat = KEEP_ALL,
    ) -> Float[Array, "B T W"]:
        """Final hidden states of the text positions, before the output head."""
        mask_input = jnp.ones(tokens.shape, bool)
        x, mask = self._sequence(image_tokens, tokens, mask_ar, mask_input)
        hidden = self.llm(x, mask.query_positions, mask, dropout, remat)
        return hidden[:, image_tokens.shape[1] :]

    def watch(
        self,
        image_tokens: Float[Array, "B NP W"],
        tokens: Int[Array, "B T"],
        mask_ar: Int[Array, "B T"],
        mask_input: Bool[Array, "B T"],
        see: Callable[[Seen, jax.Array, Layer], Seen],
        seen: Seen,
    ) -> tuple[Float[Array, "B T W"], Seen]:
        """As `hidden`, and what `see` made of every layer's attention; see `Gemma.watch`.

        Queries and keys are image tokens, then text; padding (`mask_input` False) is seen by none.
        """
        x, mask = self._sequence(image_tokens, tokens, mask_ar, mask_input)
        hidden, seen = self.llm.watch(x, mask.query_positions, mask, see, seen)
        return hidden[:, image_tokens.shape[1] :], seen

    def attention_masks(
        self, mask_ar: Int[Array, "B S"], input_mask: Bool[Array, "B S"]
    ) -> Bool[Array, "M B S S"]:
        """Masks over a whole sequence of image and text tokens, one for each kind of layer."""
        mask = PrefixMask.of(mask_ar, input_mask, self.config.llm.sliding_window)
        kinds = 1 if mask.window is None else 2
        return jnp.stack([mask.visible(layer) for layer in range(kinds)])

    def prefill(
        self,
        image_tokens: Float[Array, "B NP W"],
        tokens: Int[Array, "B T"],
        mask_ar: Int[Array, "B T"],
        mask_input: Bool[Array, "B T"],
        slots: int,
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits after each row's last prompt token, and a cache of `slots` slots to go on with.

        Rows may differ in length: padding on the right, `mask_input` False there.
        """
        x, mask = self._sequence(image_tokens, tokens, mask_ar, mask_input)
        cache = self.llm.empty_cache(x.shape[0], slots)
        cache = cache.claim(mask.query_valid, mask.query_positions)
        hidden, cache = self.llm.prefill(x, mask.query_positions, mask, cache)
        last = image_tokens.shape[1] + jnp.sum(mask_input, axis=1) - 1
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return self.llm.logits(hidden)[:, 0], cache.advance(x.shape[1])

    def extend(
        self, tokens: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits after one more token a row."""
        positions = jnp.max(jnp.where(cache.valid, cache.positions, -1), axis=1)[:, None] + 1
        cache = cache.claim(jnp.ones((tokens.shape[0], 1), bool), positions)
        visible = cache.valid[:, None, :]
        logits, cache = self._extend(tokens[:, None], positions, visible, cache)
        return logits[:, 0], cache

    def extend_many(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        visible: Bool[Array, "B T S"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T V"], KVCache]:
        """Logits after each of T more tokens a row, which need not follow one another.

        They take the next T slots; `visible` says which slots each may look at, its own among them,
        and `positions` where in the sequence it stands.
        """
        cache = cache.claim(jnp.ones(tokens.shape, bool), positions)
        return self._extend(tokens, positions, visible, cache)

    def branch(
        self, tokens: Int[Array, "B T"], group: Int[Array, "B T"], cache: KVCache
    ) -> Float[Array, "B T W"]:
        """Final hidden states of several continuations of each prompt, side by side in one row.

        Tokens with equal `group` stand together and make one continuation: each sees the whole
        cache, and of its own continuation itself and what stands before. The cache stays as it is,
        ready for more of them.
        """
        same = group[:, :, None] == group[:, None, :]
        own = same & jnp.tril(jnp.ones(same.shape[1:], bool))
        last = jnp.max(jnp.where(cache.valid, cache.positions, -1), axis=1)
        positions = last[:, None] + jnp.sum(own, axis=2)
        prompt = jnp.broadcast_to(cache.valid[:, None, :], (*tokens.shape, cache.valid.shape[1]))
        keys = jnp.concatenate([cache.positions, positions], axis=1)
        mask = self._slot_mask(jnp.concatenate([prompt, own], axis=2), positions, keys)
        return self.llm.branch(self.llm.embedder.encode(tokens), positions, mask, cache)

    def _extend(
        self, tokens: jax.Array, positions: jax.Array, visible: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Logits of tokens whose slots are claimed already."""
        mask = self._slot_mask(visible, positions, cache.positions)
        x = self.llm.embedder.encode(tokens)
        hidden, cache = self.llm.extend(x, positions, mask, cache)
        return self.llm.logits(hidden), cache.advance(tokens.shape[1])

    def _slot_mask(
        self, seen: jax.Array, query_positions: jax.Array, key_positions: jax.Array
    ) -> SlotMask:
        return SlotMask(seen, query_positions, key_positions, self.config.llm.sliding_window)

    def _sequence(
        self, image_tokens: jax.Array, tokens: jax.Array, mask_ar: jax.Array, mask_input: jax.Array
    ) -> tuple[jax.Array, PrefixMask]:
        """Embeddings of images followed by text, and what they may look at."""
        x = jnp.concatenate(
            [image_tokens.astype(self.dtype), self.llm.embedder.encode(tokens)], axis=1
        )
        before = ((0, 0), (image_tokens.shape[1], 0))
        valid = jnp.pad(mask_input.astype(bool), before, constant_values=True)
        window = self.config.llm.sliding_window
        return x, PrefixMask.of(jnp.pad(mask_ar, before), valid, window)
