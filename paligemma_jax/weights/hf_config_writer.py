"""config.json and its neighbours for a model in Hugging Face's layout, every field spelled out.

Names and meanings: transformers' configuration_paligemma.py, _gemma.py, _gemma2.py and _siglip.py.
Published files leave out what equals a default of the version that wrote them; these do not, so
that old and new versions read the same.
"""

import math
from typing import Any

from paligemma_jax.config import GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.errors import ConfigError
from paligemma_jax.weights.source import Shape

TRANSFORMERS = "4.47.0"  # the first version that knows PaliGemma 2; later ones read its files
_ROWS = 64  # the table's rows are a multiple of it
_WINDOW = 4096  # of every published PaliGemma 2
_POSITIONS = 8192


def padded_rows(vocab_size: int) -> int:
    """Rows of the table with the image placeholder and what fills it up."""
    return math.ceil((vocab_size + 1) / _ROWS) * _ROWS


def padded_shape(shape: Shape) -> Shape:
    """Shape of a table of tokens with those rows."""
    return (padded_rows(shape[0]), *shape[1:])


def hf_config(config: PaliGemmaConfig, dtype: str, sliding_window: int | None) -> dict[str, Any]:
    """config.json; `sliding_window` is what the file said that the weights came from.

    Raises ConfigError for a decoder that none of theirs computes.
    """
    img, llm = config.img, config.llm
    values = {
        "_vocab_size": llm.vocab_size,
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_size": llm.width,
        "ignore_index": -100,
        "image_token_index": llm.vocab_size,
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": llm.width,
        "text_config": _text(llm, img, sliding_window),
        "torch_dtype": dtype,
        "transformers_version": TRANSFORMERS,
        "vision_config": _vision(img, llm.width),
    }
    if not llm.tie_embeddings:
        values["tie_word_embeddings"] = False
        values["text_config"]["tie_word_embeddings"] = False
    for section in ("text_config", "vision_config"):
        values[section] |= {"num_image_tokens": img.num_patches, "torch_dtype": dtype}
    return values


def _text(llm: GemmaConfig, img: SigLIPConfig, window: int | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        "attention_bias": False,
        "head_dim": llm.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp_dim,
        "max_position_embeddings": _POSITIONS,
        "model_type": "gemma",
        "num_attention_heads": llm.num_heads,
        "num_hidden_layers": llm.depth,
        "num_key_value_heads": llm.num_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "vocab_size": padded_rows(llm.vocab_size),
    }
    if llm.post_norms:
        return values | {
            "model_type": "gemma2",
            "attn_logit_softcapping": llm.attn_logit_softcap or None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": llm.final_logit_softcap or None,
            "query_pre_attn_scalar": _query_scalar(llm.query_scale),
            "sliding_window": llm.sliding_window or window or _never_reached(img),
        }
    _require_gemma(llm)
    return values


def _never_reached(img: SigLIPConfig) -> int:
    """The published window, or a longer one where pictures fill it, for ours have none."""
    return max(_WINDOW, 2 ** math.ceil(math.log2(2 * img.num_patches)))


def _query_scalar(scale: float) -> int | float:
    scalar = scale**-2
    return round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-9) else scalar


def _require_gemma(llm: GemmaConfig) -> None:
    """Their Gemma has neither caps nor windows, and one query scale."""
    extra = {
        "query_scale": not math.isclose(llm.query_scale, llm.head_dim**-0.5),
        "attn_logit_softcap": bool(llm.attn_logit_softcap),
        "final_logit_softcap": bool(llm.final_logit_softcap),
        "sliding_window": llm.sliding_window is not None,
    }
    wrong = [f"{name}={getattr(llm, name)!r}" for name, found in extra.items() if found]
    if wrong:
        raise ConfigError(
            f"Hugging Face's Gemma cannot compute {', '.join(wrong)}, which only its Gemma 2 has. "
            f"query_scale={llm.head_dim**-0.5!r} without caps and window fits. Write the model as "
            'our own store: format="orbax"'
        )


def _vision(img: SigLIPConfig, width: int) -> dict[str, Any]:
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": img.width,
        "image_size": img.image_size,
        "intermediate_size": img.mlp_dim,
        "layer_norm_eps": 1e-6,
        "model_type": "siglip_vision_model",
        "num_attention_heads": img.num_heads,
        "num_channels": 3,
        "num_hidden_layers": img.depth,
        "patch_size": img.patch_size,
        "projection_dim": width,
        "vision_use_head": False,
    }


def hf_preprocessor(config: PaliGemmaConfig) -> dict[str, Any]:
    """preprocessor_config.json: as published, but that pictures of any mode become RGB."""
    size = config.img.image_size
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": config.img.num_patches,
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "PaliGemmaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": size, "width": size},
    }


def hf_generation(config: PaliGemmaConfig) -> dict[str, Any]:
    """generation_config.json as published."""
    values: dict[str, Any] = {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 1}
    if config.llm.post_norms:
        values["cache_implementation"] = "hybrid"
    return values | {"pad_token_id": 0, "transformers_version": TRANSFORMERS}
