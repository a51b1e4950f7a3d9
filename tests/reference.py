"""PaliGemma in NumPy and float64, written from the papers and apart from the library.

What a float32 implementation computes depends on the instructions of the processor: these small
random models turn a rounding error of 1e-5 in the image encoder into one of 1e-4 in the logits. So
the golden vectors are compared through this reference: float32 may be off it by as much as the
golden vectors are themselves, times two. It runs one unpadded example at a time, without a cache.

Given `jax.numpy` and 64-bit types, the same code is differentiated for the gradients.

Letters: P patches, D encoder width, H head width, N heads, K key-value heads, S tokens of the whole
sequence (image, prompt, answer), W decoder width, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from paligemma_jax.config import PaliGemmaConfig

NORM_EPS = 1e-6
ROPE_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class Reference:
    """A checkpoint's forward pass.

    Attributes:
      weights: arrays by big_vision's names, such as "llm/final_norm/scale".
      config: the architecture; `llm.final_logit_softcap` and `llm.sliding_window` apply.
      xp: `numpy`, or `jax.numpy` for gradients.
    """

    weights: Mapping[str, Any]
    config: PaliGemmaConfig
    xp: Any = np

    def encode(self, image: Any) -> Any:
        """Output f64[P, D] of the image encoder for one image f[height, width, 3] in [-1, 1]."""
        config, w = self.config.img, self._weights("img/")
        size, side = config.patch_size, config.image_size // config.patch_size
        patches = self.xp.asarray(image, self.xp.float64).reshape(side, size, side, size, 3)
        patches = patches.swapaxes(1, 2).reshape(side * side, size * size * 3)
        x = patches @ w["embedding/kernel"].reshape(-1, config.width) + w["embedding/bias"]
        x = x + w["pos_embedding"][0]
        for layer in range(config.depth):
            b = _layer(w, "Transformer/encoderblock/", layer)
            h = self._layer_norm(x, b["LayerNorm_0/scale"], b["LayerNorm_0/bias"])
            q, k, v = (
                self.xp.einsum("pd,dnh->nph", h, b[f"{self._ATTENTION}/{name}/kernel"])
                + b[f"{self._ATTENTION}/{name}/bias"][:, None]
                for name in ("query", "key", "value")
            )
            weights = self._softmax(self.xp.einsum("nph,nqh->npq", q, k) * q.shape[-1] ** -0.5)
            mixed = self.xp.einsum("npq,nqh->pnh", weights, v)
            out = self.xp.einsum("pnh,nhd->pd", mixed, b[f"{self._ATTENTION}/out/kernel"])
            x = x + out + b[f"{self._ATTENTION}/out/bias"]
            h = self._layer_norm(x, b["LayerNorm_1/scale"], b["LayerNorm_1/bias"])
            h = self._gelu(h @ b["MlpBlock_0/Dense_0/kernel"] + b["MlpBlock_0/Dense_0/bias"])
            x = x + h @ b["MlpBlock_0/Dense_1/kernel"] + b["MlpBlock_0/Dense_1/bias"]
        return self._layer_norm(
            x, w["Transformer/encoder_norm/scale"], w["Transformer/encoder_norm/bias"]
        )

    def embed_image(self, image: Any) -> Any:
        """Image tokens f64[P, W] of one image."""
        w = self._weights("img/")
        return self.encode(image) @ w["head/kernel"] + w["head/bias"]

    def logits(self, image_tokens: Any, prompt: Any, answer: Any = ()) -> Any:
        """Logits f64[T, V] at every text token of one example.

        Args:
          image_tokens: f[P, W] of all its images.
          prompt: i[T1], read with the images in both directions.
          answer: i[T2], read causally; T = T1 + T2.
        """
        config, w, xp = self.config.llm, self._weights("llm/"), self.xp
        table = w["embedder/input_embedding"]
        ids = np.concatenate([np.asarray(prompt, int), np.asarray(answer, int)])
        x = xp.concatenate([xp.asarray(image_tokens), table[ids] * config.width**0.5])
        count, prefix = x.shape[0], x.shape[0] - len(answer)
        place = np.arange(count)
        mask = (place[None] <= place[:, None]) | (place[None] < prefix)
        same_block = (place[None] < prefix) & (place[:, None] < prefix)
        near = same_block | (place[:, None] - place[None] < (config.sliding_window or count))
        for layer in range(config.depth):
            b = _layer(w, "layers/", layer)
            seen = mask & near if layer % 2 == 0 else mask
            h = self._attend(self._rms_norm(x, b["pre_attention_norm/scale"]), b, seen)
            if config.post_norms:
                h = self._rms_norm(h, b["post_attention_norm/scale"])
            x = x + h
            h = self._rms_norm(x, b["pre_ffw_norm/scale"])
            gate, up = b["mlp/gating_einsum"]
            h = (self._gelu(h @ gate) * (h @ up)) @ b["mlp/linear"]
            if config.post_norms:
                h = self._rms_norm(h, b["post_ffw_norm/scale"])
            x = x + h
        x = self._rms_norm(x, w["final_norm/scale"])[count - len(ids) :]
        return self._soft_cap(x @ table.T, config.final_logit_softcap)

    def loss(
        self,
        image_tokens: Any,
        prompt: Any,
        answer: Any,
        mask_loss: Any,
        label_smoothing: float = 0.0,
    ) -> Any:
        """Mean cross-entropy (nats) of one example's supervised tokens, as big_vision takes it.

        Smoothing spreads over the V - 1 other classes; `mask_loss` is i[T], 1 where supervised.
        """
        logits = self.logits(image_tokens, prompt, answer)[:-1]
        targets = np.concatenate([prompt, answer])[1:]
        highest = logits.max(-1, keepdims=True)
        logp = logits - highest - self.xp.log(self.xp.exp(logits - highest).sum(-1, keepdims=True))
        on_target = logp[np.arange(len(targets)), targets]
        rest = (logp.sum(-1) - on_target) / (logp.shape[-1] - 1)
        nll = -(1 - label_smoothing) * on_target - label_smoothing * rest
        return self.xp.sum(nll * mask_loss[1:]) / max(mask_loss[1:].sum(), 1)

    _ATTENTION = "MultiHeadDotProductAttention_0"

    def _weights(self, prefix: str) -> dict[str, Any]:
        found = {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}
        return {name: self.xp.asarray(value, self.xp.float64) for name, value in found.items()}

    def _attend(self, x: Any, b: Mapping[str, Any], mask: np.ndarray) -> Any:
        config, xp = self.config.llm, self.xp
        groups = config.num_heads // config.num_kv_heads
        q = xp.einsum("sw,nwh->nsh", x, b["attn/q_einsum/w"])
        k, v = xp.einsum("sw,ckwh->cksh", x, b["attn/kv_einsum/w"])
        q, k = self._rotate(q) * config.query_scale, self._rotate(k)
        k, v = xp.repeat(k, groups, axis=0), xp.repeat(v, groups, axis=0)
        scores = self._soft_cap(xp.einsum("nsh,nth->nst", q, k), config.attn_logit_softcap)
        mixed = xp.einsum("nst,nth->nsh", self._softmax(xp.where(mask, scores, -xp.inf)), v)
        return xp.einsum("nsh,nhw->sw", mixed, b["attn/attn_vec_einsum/w"])

    def _rotate(self, x: Any) -> Any:
        half = x.shape[-1] // 2
        angle = np.arange(x.shape[1])[:, None] / ROPE_BASE ** (np.arange(half) / half)
        sin, cos = np.sin(angle), np.cos(angle)
        first, second = x[..., :half], x[..., half:]
        return self.xp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def _layer_norm(self, x: Any, scale: Any, bias: Any) -> Any:
        centered = x - x.mean(-1, keepdims=True)
        variance = (centered**2).mean(-1, keepdims=True)
        return centered / self.xp.sqrt(variance + NORM_EPS) * scale + bias

    def _rms_norm(self, x: Any, scale: Any) -> Any:
        return x / self.xp.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPS) * (1 + scale)

    def _softmax(self, x: Any) -> Any:
        e = self.xp.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def _gelu(self, x: Any) -> Any:
        return 0.5 * x * (1 + self.xp.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def _soft_cap(self, x: Any, cap: float) -> Any:
        return self.xp.tanh(x / cap) * cap if cap else x


def _layer(weights: Mapping[str, Any], prefix: str, number: int) -> dict[str, Any]:
    """The weights of one layer, without the prefix."""
    found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    return {name: value[number] for name, value in found.items()}
