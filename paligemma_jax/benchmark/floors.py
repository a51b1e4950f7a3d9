"""The least time that a piece of work can take: its arithmetic and its bytes, from the sizes alone.

A multiplication with an addition counts as 2 operations. Bytes are those that must be read or
written once: weights, and keys and values. Attention is counted full, since the prefix of a
prefix-LM sees itself whole. Norms, activations and soft-caps are left out: they are below 0.1 %.
"""

import dataclasses

from paligemma_jax.config import GemmaConfig, PaliGemmaConfig, SigLIPConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """What must be done: floating-point operations, and bytes moved to and from memory."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a number: in the decoder's matrices, in its token table, and anywhere else."""

    matrix: float
    table: float
    other: float

    @classmethod
    def of(cls, size: float) -> "Sizes":
        """The same everywhere."""
        return cls(size, size, size)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a machine can do: bytes a second, and operations a second in one precision."""

    bandwidth: float
    rate: float

    def seconds(self, *parts: Work) -> float:
        """Least time for parts that come one after the other, each bound by one or the other."""
        return sum(max(p.flops / self.rate, p.bytes / self.bandwidth) for p in parts)


def encode_work(config: PaliGemmaConfig, images: int, sizes: Sizes) -> Work:
    """The image encoder and its projection."""
    return Work(
        images * _encoder_flops(config.img, config.llm.width),
        _encoder_weights(config.img, config.llm.width) * sizes.other,
    )


def prefill_work(config: PaliGemmaConfig, rows: int, text: int, sizes: Sizes) -> Work:
    """The decoder over one picture and `text` tokens a row, with logits at the last position."""
    llm, length = config.llm, config.img.num_patches + text
    attention = llm.depth * 4 * length**2 * llm.num_heads * llm.head_dim
    flops = 2 * length * _matrices(llm) + attention + 2 * _table(llm)
    written = rows * length * cache_values(llm) * sizes.other
    return Work(rows * flops, _decoder_bytes(llm, sizes) + written)


def decode_work(config: PaliGemmaConfig, rows: int, context: int, sizes: Sizes) -> Work:
    """One more token a row, after `context` tokens of pictures and text a row."""
    llm = config.llm
    attention = llm.depth * 4 * context * llm.num_heads * llm.head_dim
    flops = 2 * (_matrices(llm) + _table(llm)) + attention
    cache = rows * (context + 1) * cache_values(llm) * sizes.other
    return Work(rows * flops, _decoder_bytes(llm, sizes) + cache)


def cache_values(llm: GemmaConfig) -> int:
    """Numbers that one token leaves in the key-value cache."""
    return 2 * llm.depth * llm.num_kv_heads * llm.head_dim


def _encoder_flops(img: SigLIPConfig, width: int) -> float:
    n, d = img.num_patches, img.width
    layer = 4 * 2 * n * d * d + 2 * 2 * n * d * img.mlp_dim + 2 * 2 * n * n * d
    patches = 2 * n * 3 * img.patch_size**2 * d
    return img.depth * layer + patches + 2 * n * d * width


def _encoder_weights(img: SigLIPConfig, width: int) -> int:
    d, f = img.width, img.mlp_dim
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
    ends = 3 * img.patch_size**2 * d + d + img.num_patches * d + 2 * d
    return img.depth * layer + ends + d * width + width


def _matrices(llm: GemmaConfig) -> int:
    """Weights of the layers that are multiplied with every token."""
    attention = llm.width * llm.head_dim * 2 * (llm.num_heads + llm.num_kv_heads)
    return llm.depth * (attention + 3 * llm.width * llm.mlp_dim)


def _table(llm: GemmaConfig) -> int:
    return llm.vocab_size * llm.width


def _decoder_bytes(llm: GemmaConfig, sizes: Sizes) -> float:
    norms = llm.depth * llm.width * (4 if llm.post_norms else 2) + llm.width
    return _matrices(llm) * sizes.matrix + norms * sizes.other + _table(llm) * sizes.table
