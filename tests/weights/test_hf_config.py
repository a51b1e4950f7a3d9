import dataclasses
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from paligemma_jax.config import VARIANTS
from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.hf_config import HFConfig


@pytest.mark.parametrize(
    "name",
    ["paligemma-3b-pt-224", "paligemma-3b-pt-896", "paligemma2-3b-pt-224", "paligemma2-10b-pt-448"]
    + ["paligemma2-28b-pt-224"],
)
def test_fields_that_published_files_omit(
    name: str, tmp_path: Path, synthetic: ModuleType, edit_json
):
    config = dataclasses.replace(VARIANTS[name], text_length=128)
    if config.llm.post_norms:
        llm = dataclasses.replace(config.llm, final_logit_softcap=30.0)
        config = dataclasses.replace(config, llm=llm)
    values = synthetic.hub_config(config, "bfloat16")
    if name == "paligemma2-3b-pt-224":
        assert "num_attention_heads" not in values["text_config"]
        assert "image_size" not in values["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    read = HFConfig(tmp_path / "config.json")
    assert read.vocab_size == 257_152
    inferred = read.to_config(257_152)
    assert inferred.img == config.img
    assert inferred.llm.query_scale == pytest.approx(config.llm.query_scale, rel=1e-15)
    llm = dataclasses.replace(inferred.llm, query_scale=config.llm.query_scale)
    assert llm == config.llm


@pytest.fixture
def path(golden: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(golden / "huggingface/pg2/hub_old/config.json", tmp_path))


def test_every_missing_field_is_named(path: Path, edit_json):
    with edit_json(path) as config:
        del config["text_config"]["hidden_size"]
        del config["vision_config"]["intermediate_size"]
        config["vision_config"]["patch_size"] = "14"
    with pytest.raises(CheckpointError) as error:
        HFConfig(path)
    for problem in (
        "(3 problems)",
        "text_config.hidden_size is missing",
        "vision_config.intermediate_size is missing",
        "vision_config.patch_size is '14', no positive whole number",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (None, "model_type", "llava", "of type 'llava'"),
        (None, "text_config", None, "text_config is missing"),
        (None, "quantization_config", {"bits": 4}, "weights are quantized"),
        (None, "image_token_index", "<image>", "image_token_index is '<image>'"),
        ("text_config", "model_type", "llama", "not gemma or gemma2"),
        ("text_config", "rope_theta", 1e6, "rope_theta is 1000000.0"),
        ("text_config", "rope_parameters", {"rope_theta": 5.0}, "rope_theta is 5.0"),
        ("text_config", "rope_parameters", {"rope_type": "yarn"}, "not of type default"),
        ("text_config", "hidden_activation", "silu", "hidden_activation is 'silu'"),
        ("text_config", "rms_norm_eps", 1e-5, "rms_norm_eps is 1e-05"),
        ("text_config", "num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("text_config", "query_pre_attn_scalar", 0, "query_pre_attn_scalar is 0, no positive"),
        ("text_config", "final_logit_softcapping", float("nan"), "softcapping is nan"),
        ("text_config", "attn_logit_softcapping", "50", "softcapping is '50', no number"),
        ("text_config", "num_key_value_heads", 3, "not a multiple of num_kv_heads 3"),
        ("vision_config", "layer_norm_eps", 1e-5, "layer_norm_eps is 1e-05"),
        ("vision_config", "image_size", 30, "not a multiple of patch_size 14"),
    ],
)
def test_other_models_are_refused(
    section: str | None, field: str, value: object, message: str, path: Path, edit_json
):
    with edit_json(path) as config:
        (config[section] if section else config)[field] = value
    with pytest.raises(CheckpointError, match=message):
        HFConfig(path).to_config(256)


def test_caps_may_be_off(path: Path, edit_json):
    with edit_json(path) as config:
        config["text_config"]["final_logit_softcapping"] = None
        config["text_config"]["attn_logit_softcapping"] = 0
    llm = HFConfig(path).to_config(256).llm
    assert (llm.final_logit_softcap, llm.attn_logit_softcap) == (0.0, 0.0)


def test_values_of_transformers_5(path: Path, edit_json):
    old = HFConfig(path).to_config(256)
    with edit_json(path) as config:
        config["vocab_size"] = config.pop("_vocab_size")
        config["dtype"] = config.pop("torch_dtype")
        text = config["text_config"]
        text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "rope_type": "default"}
        text["layer_types"] = ["sliding_attention", "full_attention"] * 2
        text["use_bidirectional_attention"] = True
    assert HFConfig(path).to_config(256) == old


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "\x00\xff"])
def test_files_that_are_no_config(content: str, path: Path):
    path.write_text(content)
    with pytest.raises(CheckpointError, match="config.json"):
        HFConfig(path)
