"""The text and the JSON document of `paligemma info`."""

from typing import TYPE_CHECKING, Any

from paligemma_jax.cli.sizes import data_size
from paligemma_jax.config import (
    GEMMA2_2B,
    GEMMA2_9B,
    GEMMA2_27B,
    GEMMA_2B,
    GemmaConfig,
    PaliGemmaConfig,
    SigLIPConfig,
)
from paligemma_jax.models.recipe import recipe_names
from paligemma_jax.weights.footprint import (
    PRECISIONS,
    cache_bytes_per_token,
    parameter_counts,
    weight_bytes,
)

if TYPE_CHECKING:
    from paligemma_jax.weights.checkpoint import CheckpointInfo

_KINDS = {
    "big_vision": "big_vision .npz",
    "huggingface": "Hugging Face directory",
    "store": "directory written by paligemma-jax",
}
_DECODERS = {
    "Gemma 2B": GEMMA_2B,
    "Gemma 2 2B": GEMMA2_2B,
    "Gemma 2 9B": GEMMA2_9B,
    "Gemma 2 27B": GEMMA2_27B,
}


def as_dict(
    name: str, config: PaliGemmaConfig, checkpoint: "CheckpointInfo | None"
) -> dict[str, Any]:
    """Plain values, ready for JSON; sizes in bytes."""
    counts = parameter_counts(config)
    result: dict[str, Any] = {
        "model": name,
        "image_encoder": encoder_name(config.img),
        "decoder": decoder_name(config.llm),
        "resolution": config.img.image_size,
        "image_tokens": config.img.num_patches,
        "text_length": config.text_length,
        "parameters": {"total": sum(counts.values()), **counts},
        "weight_bytes": weight_bytes(config),
        "kv_cache_bytes_per_token": {
            name: cache_bytes_per_token(config.llm, _cache_bits(bits))
            for name, bits in PRECISIONS.items()
        },
        "config": config.to_dict(),
    }
    if checkpoint is not None:
        result["checkpoint"] = {
            "path": str(checkpoint.path),
            "kind": checkpoint.kind,
            "stored_bytes": checkpoint.nbytes,
            "parameters_by_dtype": checkpoint.dtypes,
            "quantization": None if checkpoint.recipe is None else recipe_names(checkpoint.recipe),
            "scale_bytes": checkpoint.scale_nbytes,
            "tokenizer": checkpoint.has_tokenizer,
            "mask_codec": checkpoint.has_mask_codec,
            "processor": checkpoint.processor,
        }
    return result


def as_text(name: str, config: PaliGemmaConfig, checkpoint: "CheckpointInfo | None") -> str:
    """The same for people."""
    blocks = [[name], _architecture(config)]
    if checkpoint is not None:
        blocks.append(_checkpoint(checkpoint))
    return "\n\n".join(
        "\n".join(block) for block in [*blocks, _parameters(config), _memory(config)]
    )


def encoder_name(config: SigLIPConfig) -> str:
    """ "SigLIP So400m/14", or the patch size alone for another size."""
    if _encoder_sizes(config) == _encoder_sizes(SigLIPConfig()):
        return "SigLIP So400m/14"
    return f"SigLIP, patch {config.patch_size}"


def decoder_name(config: GemmaConfig) -> str:
    """The published decoder of these sizes, or the family for another size."""
    for name, published in _DECODERS.items():
        if _decoder_sizes(config) == _decoder_sizes(published):
            return name
    return "Gemma 2, own size" if config.post_norms else "Gemma, own size"


def _encoder_sizes(c: SigLIPConfig) -> tuple[int, ...]:
    return c.patch_size, c.width, c.depth, c.mlp_dim, c.num_heads


def _decoder_sizes(c: GemmaConfig) -> tuple[int, ...]:
    return c.width, c.depth, c.mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.post_norms


def _line(label: str, text: str) -> str:
    return f"  {label:<16}{text}"


def _architecture(config: PaliGemmaConfig) -> list[str]:
    img, llm = config.img, config.llm
    caps = [
        f"{place} logits capped at {cap:g}"
        for place, cap in (
            ("attention", llm.attn_logit_softcap), ("output", llm.final_logit_softcap)
        )
        if cap
    ]  # fmt: skip
    lines = [
        _line("image encoder", encoder_name(img)),
        _line(
            "", f"{img.depth} layers, width {img.width}, MLP {img.mlp_dim}, {img.num_heads} heads"
        ),
        _line(
            "picture",
            f"{img.image_size} x {img.image_size} pixels, {img.num_patches:,} image tokens",
        ),
        _line("decoder", decoder_name(llm)),
        _line(
            "",
            f"{llm.depth} layers, width {llm.width}, MLP {llm.mlp_dim}, {llm.num_heads} heads and "
            f"{llm.num_kv_heads} key-value of {llm.head_dim}",
        ),
        _line("vocabulary", f"{llm.vocab_size:,} pieces"),
        _line("text length", f"{config.text_length} tokens of prompt and answer, as trained"),
    ]
    if caps:
        lines.append(_line("soft-caps", ", ".join(caps)))
    if llm.sliding_window:
        lines.append(_line("sliding window", f"{llm.sliding_window:,} tokens on even layers"))
    return lines


def _checkpoint(info: "CheckpointInfo") -> list[str]:
    image = info.processor["image"]
    dtypes = ", ".join(f"{count:,} in {dtype}" for dtype, count in info.dtypes.items())
    codec = "present" if info.has_mask_codec else "missing; segment takes it as --mask-codec"
    return [
        _line("checkpoint", f"{_KINDS[info.kind]}, {data_size(info.nbytes)} of weights"),
        _line("stored", dtypes),
        *_few_bits(info),
        _line("tokenizer", "present" if info.has_tokenizer else "missing; pass it as --tokenizer"),
        _line("mask codec", codec),
        _line("preprocessing", f"pictures {image['method']} to {image['size']} pixels a side,"),
        _line("", f"prompts encoded by the rule of {info.processor['encoding']}"),
    ]


def _few_bits(info: "CheckpointInfo") -> list[str]:
    if info.recipe is None:
        return []
    words = []
    for kind, name in recipe_names(info.recipe).items():
        format, _, group = (name or "as trained").partition(":")
        groups = {"": "", "row": ", a scale a channel"}.get(group, f" in groups of {group}")
        words.append(f"{kind} {format}{groups}")
    calibrated = info.origin.get("calibrated")
    scales = f"{data_size(info.scale_nbytes)} of scales"
    return [
        _line("quantized", "; ".join(words)),
        _line("", scales if calibrated is None else f"{scales}; calibrated on {calibrated}"),
    ]


def _parameters(config: PaliGemmaConfig) -> list[str]:
    counts = parameter_counts(config)
    lines = [f"  {part:<16}{count:>16,}" for part, count in counts.items()]
    return ["parameters", *lines, f"  {'total':<16}{sum(counts.values()):>16,}"]


def _memory(config: PaliGemmaConfig) -> list[str]:
    lines = ["memory                     weights   KV cache of 1,000 tokens"]
    for name, size in weight_bytes(config).items():
        cache = 1000 * cache_bytes_per_token(config.llm, _cache_bits(PRECISIONS[name]))
        lines.append(f"  {name:<16}{data_size(size):>16}   {data_size(cache)}")
    lines.append(
        "  int8 and int4 are weights without their scales, beside a bfloat16 cache:\n"
        "  --quantize int8"
    )
    return lines


def _cache_bits(weight_bits: int) -> int:
    """Keys and values are kept in the activations' dtype, which is no integer."""
    return max(16, weight_bits)
