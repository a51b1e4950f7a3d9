"""Configurations: what is refused, what survives JSON, and the published names."""

import dataclasses
import json
from collections import Counter
from typing import Any

import pytest

from paligemma_jax.config import (
    GEMMA2_2B,
    GEMMA2_27B,
    VARIANTS,
    GemmaConfig,
    PaliGemmaConfig,
    SigLIPConfig,
)
from paligemma_jax.errors import ConfigError, PaliGemmaError
from tests.tiny import GEMMA, GEMMA2, SIGLIP, tiny_config


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_size=0), "image_size is 0, must be positive"),
        (dict(depth=-1), "depth is -1, must be positive"),
        (dict(image_size=225), "image_size 225 is not a multiple of patch_size 14"),
        (dict(width=1150), "width 1150 is not a multiple of num_heads 16"),
        (dict(depth=0, mlp_dim=0), "depth is 0.*mlp_dim is 0"),
    ],
)
def test_impossible_image_encoders(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        SigLIPConfig(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(width=0), "width is 0, must be positive"),
        (dict(num_kv_heads=3), "num_heads 4 is not a multiple of num_kv_heads 3"),
        (dict(head_dim=7), "head_dim 7 is odd"),
        (dict(attn_logit_softcap=-1.0), "soft-caps must be 0.0"),
        (dict(final_logit_softcap=-1.0), "soft-caps must be 0.0"),
        (dict(sliding_window=0), "sliding_window is 0, must be None or positive"),
        (dict(head_dim=7, sliding_window=0), "head_dim 7 is odd.*sliding_window is 0"),
    ],
)
def test_impossible_decoders(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(GEMMA, **changes)


def test_config_errors_are_value_errors():
    assert issubclass(ConfigError, PaliGemmaError) and issubclass(PaliGemmaError, ValueError)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(GEMMA),
        tiny_config(GEMMA2, sliding_window=4096, tie_embeddings=False),
        VARIANTS["paligemma2-28b-mix-448"],
    ],
)
def test_json_and_back(config: PaliGemmaConfig):
    assert PaliGemmaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_names_what_is_missing_or_unknown():
    values = tiny_config().to_dict()
    with pytest.raises(ConfigError, match="lacks the field 'llm'"):
        PaliGemmaConfig.from_dict({"img": values["img"]})
    with pytest.raises(ConfigError, match="head_dim"):
        llm = {k: v for k, v in values["llm"].items() if k != "head_dim"}
        PaliGemmaConfig.from_dict({**values, "llm": llm})
    with pytest.raises(ConfigError, match="colour"):
        PaliGemmaConfig.from_dict({**values, "img": {**values["img"], "colour": 3}})
    with pytest.raises(ConfigError, match="size"):
        PaliGemmaConfig.from_dict({**values, "size": 3})
    with pytest.raises(ConfigError, match="odd"):
        PaliGemmaConfig.from_dict({**values, "llm": {**values["llm"], "head_dim": 7}})


def test_defaults_may_be_left_out():
    values = {"img": {}, "llm": dataclasses.asdict(GEMMA2)}
    assert PaliGemmaConfig.from_dict(values) == PaliGemmaConfig(img=SigLIPConfig(), llm=GEMMA2)


def test_configs_are_frozen_and_hashable():
    config = tiny_config()
    assert hash(config) == hash(tiny_config()) and config == tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.text_length = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_derived_sizes():
    assert (SIGLIP.head_dim, SIGLIP.num_patches) == (6, 4)
    assert SigLIPConfig().head_dim == 72
    patches = [SigLIPConfig(image_size=size).num_patches for size in (224, 448, 896)]
    assert patches == [256, 1024, 4096]


def test_published_names():
    families = Counter("-".join(name.split("-")[:3]) for name in VARIANTS)
    assert families == {
        "paligemma-3b-pt": 3,
        "paligemma-3b-mix": 2,
        "paligemma-3b-ft": 54,
        "paligemma2-3b-pt": 3,
        "paligemma2-3b-mix": 2,
        "paligemma2-3b-ft": 1,
        "paligemma2-10b-pt": 3,
        "paligemma2-10b-mix": 2,
        "paligemma2-10b-ft": 1,
        "paligemma2-28b-pt": 3,
        "paligemma2-28b-mix": 2,
    }
    assert len(VARIANTS) == 76
    for name, config in VARIANTS.items():
        assert name.endswith(f"-{config.img.image_size}")


@pytest.mark.parametrize(
    "name, text_length",
    [
        ("paligemma-3b-pt-224", 128),
        ("paligemma-3b-pt-896", 512),
        ("paligemma2-3b-mix-224", 256),
        ("paligemma2-10b-mix-448", 512),
        ("paligemma2-3b-ft-docci-448", 512),
        ("paligemma-3b-ft-refcoco-seg-896", 48),
    ],
)
def test_text_lengths(name: str, text_length: int):
    assert VARIANTS[name].text_length == text_length


def test_decoder_sizes():
    def sizes(config: GemmaConfig) -> tuple[Any, ...]:
        return (config.width, config.depth, config.mlp_dim, config.num_heads, config.num_kv_heads)

    gemma = VARIANTS["paligemma-3b-pt-224"].llm
    assert sizes(gemma) == (2048, 18, 16_384, 8, 1) and not gemma.post_norms
    assert sizes(GEMMA2_2B) == (2304, 26, 9216, 8, 4) and GEMMA2_2B.post_norms
    assert sizes(VARIANTS["paligemma2-10b-pt-224"].llm) == (3584, 42, 14_336, 16, 8)
    assert sizes(GEMMA2_27B) == (4608, 46, 36_864, 32, 16)
    assert GEMMA2_2B.query_scale == 1 / 16 and GEMMA2_27B.query_scale == 1 / 12
    assert {c.llm.vocab_size for c in VARIANTS.values()} == {257_152}
