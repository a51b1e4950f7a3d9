"""Hugging Face's config.json and its neighbors, read and written.

Names and meanings: transformers' configuration_paligemma.py, _gemma.py, _gemma2.py and _siglip.py.
Published files leave out what equals a default of the version that wrote them, and some carry stale
values; those written here spell every field out, so that old and new versions read the same.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.config import VOCAB_SIZE, GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.errors import CheckpointError, ConfigError, problem_list
from paligemma_jax.filesystem import read_json

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# Ours -> theirs. What has no default in every version must be there.
_VISION = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "patch_size": "patch_size",
    "image_size": "image_size",
}
_VISION_DEFAULTS = {"image_size": 224}
_TEXT = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
_TEXT_DEFAULTS = {
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4},
}
_GEMMA2_DEFAULTS = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
}
_POSITIVE = ("query_pre_attn_scalar",)  # the caps may also be absent: null or 0
# Fields that would change the mathematics, and the values that ours are.
_GELU = ("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast")  # "gelu" too is run with tanh
_FIXED_TEXT: dict[str, tuple[Any, ...]] = {
    "rope_theta": (10_000.0,),
    "rms_norm_eps": (1e-6,),
    "hidden_act": _GELU,
    "hidden_activation": (None, *_GELU),
    "attention_bias": (False,),
    "rope_scaling": (None,),
}
_FIXED_VISION: dict[str, tuple[Any, ...]] = {
    "layer_norm_eps": (1e-6,),
    "hidden_act": _GELU,
    "num_channels": (3,),
}


class HFConfig:
    """What config.json says, defaults filled in; CheckpointError names every problem.

    Attributes:
      vocab_size: rows of the embedding table that mean something, if the file says so: the rows
        before the image placeholder, whose own and following ones are filler.
      sliding_window: what the file asks for; big_vision's models, from which the weights come, have
        none, so `to_config` leaves it out.
    """

    def __init__(self, path: Path):
        self._path = path
        self._values = read_json(path)
        self._problems: list[str] = []
        model_type = self._values.get("model_type")
        if model_type != "paligemma":
            raise CheckpointError(
                f'{path} describes a model of type {model_type!r}, expected "paligemma". Pass a '
                "PaliGemma or PaliGemma 2 directory."
            )
        if "quantization_config" in self._values:
            self._problems.append("its weights are quantized (quantization_config)")
        text, vision = self._section("text_config"), self._section("vision_config")
        self.kind = text.get("model_type", "gemma")
        if self.kind not in _TEXT_DEFAULTS:
            self._problems.append(f"text_config.model_type is {self.kind!r}, not gemma or gemma2")
        self._check_fixed("text_config", text, _FIXED_TEXT)
        self._check_fixed("vision_config", vision, _FIXED_VISION)
        defaults = _TEXT_DEFAULTS.get(self.kind, {})
        self._text = self._sizes("text_config", text, _TEXT, defaults)
        self._vision = self._sizes("vision_config", vision, _VISION, _VISION_DEFAULTS)
        self.tied: bool = bool(self._values.get("tie_word_embeddings", True))
        self.vocab_size = self._vocab_size(text)
        self._numbers = {}
        self.sliding_window: int | None = None
        if self.kind == "gemma2":
            self.sliding_window = text.get("sliding_window", 4096)
            self._numbers = {name: text.get(name, d) for name, d in _GEMMA2_DEFAULTS.items()}
            self._problems += [
                f"text_config.{name} is {value!r}, no {'positive ' * (name in _POSITIVE)}number"
                for name, value in self._numbers.items()
                if not _is_number(value, positive=name in _POSITIVE)
            ]
        if self._problems:
            raise CheckpointError(
                f"{path} does not describe a PaliGemma that can be run "
                f"{problem_list(self._problems)}\n"
                "Download the config.json published with the weights again, or dequantize and save "
                "the model with transformers first."
            )

    def to_config(self, vocab_size: int, *, tie_embeddings: bool = True) -> PaliGemmaConfig:
        """The configuration for a table cut to `vocab_size` rows; `text_length` is the default."""
        numbers = self._numbers
        scale = numbers.get("query_pre_attn_scalar", self._text["head_dim"]) ** -0.5
        try:
            return PaliGemmaConfig(
                img=SigLIPConfig(**self._vision),
                llm=GemmaConfig(
                    **self._text,
                    query_scale=scale,
                    attn_logit_softcap=float(numbers.get("attn_logit_softcapping") or 0),
                    final_logit_softcap=float(numbers.get("final_logit_softcapping") or 0),
                    vocab_size=vocab_size,
                    post_norms=self.kind == "gemma2",
                    tie_embeddings=tie_embeddings,
                ),
            )
        except (ConfigError, TypeError) as e:
            raise CheckpointError(
                f"{self._path} is not valid: {e} Download the config.json published with the "
                "weights again."
            ) from e

    def _section(self, name: str) -> dict[str, Any]:
        section = self._values.get(name)
        if isinstance(section, dict):
            return section
        self._problems.append(f"{name} is missing")
        return {}

    def _sizes(
        self,
        section: str,
        values: Mapping[str, Any],
        names: Mapping[str, str],
        defaults: Mapping[str, int],
    ) -> dict[str, Any]:
        sizes = {}
        for ours, theirs in names.items():
            value = values.get(theirs, defaults.get(theirs))
            if value is None and values:
                self._problems.append(f"{section}.{theirs} is missing")
            elif values and not _is_whole(value):
                self._problems.append(f"{section}.{theirs} is {value!r}, no positive whole number")
            sizes[ours] = value
        return sizes

    def _check_fixed(
        self, section: str, values: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]
    ) -> None:
        rope = values.get("rope_parameters") or {}  # where transformers 5 keeps it
        if isinstance(rope, dict):
            values = {**values, **{k: v for k, v in rope.items() if k == "rope_theta"}}
            if rope.get("rope_type", "default") != "default":
                self._problems.append(f"{section}.rope_parameters is {rope}, not of type default")
        for name, allowed in fixed.items():
            if name in values and values[name] not in allowed:
                known = " or ".join(map(repr, allowed))
                self._problems.append(f"{section}.{name} is {values[name]!r}, expected {known}")

    def _vocab_size(self, text: Mapping[str, Any]) -> int | None:
        # image_token_index counts the real pieces; vocab_size may include the filler rows.
        for name in ("image_token_index", "image_token_id", "_vocab_size"):
            if name in self._values:
                value = self._values[name]
                if _is_whole(value):
                    return value
                self._problems.append(f"{name} is {value!r}, no positive whole number")
                return None
        return VOCAB_SIZE if text.get("vocab_size", 0) >= VOCAB_SIZE else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any, *, positive: bool) -> bool:
    if not positive and (value is None or value == 0):
        return True
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


TRANSFORMERS = "4.47.0"  # the first version that knows PaliGemma 2; later ones read its files
_ROWS = 64  # the table's rows are a multiple of it
_WINDOW = 4096  # of every published PaliGemma 2
_POSITIONS = 8192


def padded_rows(vocab_size: int) -> int:
    """Rows of the table with the image placeholder and what fills it up."""
    return math.ceil((vocab_size + 1) / _ROWS) * _ROWS


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
    """The published window, or a longer one where images fill it, for ours have none."""
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
            f"Hugging Face's Gemma cannot compute {', '.join(wrong)}: expected "
            f"query_scale={llm.head_dim**-0.5!r}, no soft-caps and no window. Write a native "
            'checkpoint: format="orbax" (--to orbax)'
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
    """preprocessor_config.json: as published, but that images of any mode become RGB."""
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


_PUBLISHED_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def hf_generation(config: PaliGemmaConfig) -> dict[str, Any]:
    """generation_config.json as published."""
    values: dict[str, Any] = {"_from_model_config": True} | _PUBLISHED_IDS
    if config.llm.post_norms:
        values["cache_implementation"] = "hybrid"
    return values | {"transformers_version": TRANSFORMERS}


def read_hf_generation(directory: Path) -> dict[str, Any]:
    """What a directory's generation_config.json says beyond the published one; {} without one."""
    path = directory / GENERATION_CONFIG
    values = read_json(path) if path.is_file() else {}
    known = {"_from_model_config", "transformers_version", "cache_implementation"}
    return {
        name: value
        for name, value in values.items()
        if name not in known and (name not in _PUBLISHED_IDS or value != _PUBLISHED_IDS[name])
    }
