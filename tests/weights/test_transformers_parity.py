"""transformers reads and writes the same: pytest -m parity"""

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from paligemma_jax.config import VARIANTS
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.hf_config import HFConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def named(resolution: int) -> list[str]:
    sizes = ("paligemma-3b", "paligemma2-3b", "paligemma2-10b", "paligemma2-28b")
    return [f"{size}-pt-{resolution}" for size in sizes]


@pytest.mark.parametrize("name", [*named(224), *named(896)])
def test_omitted_fields_mean_the_same(name: str, tmp_path: Path, synthetic: ModuleType):
    variant = VARIANTS[name]
    llm = dataclasses.replace(variant.llm, final_logit_softcap=30.0 * variant.llm.post_norms)
    variant = dataclasses.replace(variant, llm=llm)
    (tmp_path / "config.json").write_text(json.dumps(synthetic.hub_config(variant, "bfloat16")))
    ours = HFConfig(tmp_path / "config.json").to_config(257_152)
    theirs: Any = transformers.AutoConfig.from_pretrained(tmp_path)
    text, vision = theirs.text_config, theirs.vision_config
    assert (ours.img.image_size, ours.img.patch_size) == (vision.image_size, vision.patch_size)
    assert (ours.img.width, ours.img.depth) == (vision.hidden_size, vision.num_hidden_layers)
    assert ours.img.mlp_dim == vision.intermediate_size
    assert ours.img.num_heads == vision.num_attention_heads
    llm = ours.llm
    assert (llm.width, llm.depth, llm.mlp_dim) == (
        text.hidden_size,
        text.num_hidden_layers,
        text.intermediate_size,
    )
    assert (llm.num_heads, llm.num_kv_heads, llm.head_dim) == (
        text.num_attention_heads,
        text.num_key_value_heads,
        text.head_dim,
    )
    assert llm.attn_logit_softcap == (getattr(text, "attn_logit_softcapping", None) or 0.0)
    assert llm.final_logit_softcap == (getattr(text, "final_logit_softcapping", None) or 0.0)
    scale = getattr(text, "query_pre_attn_scalar", text.head_dim) ** -0.5
    assert llm.query_scale == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize("original_format", [True, False])
def test_what_transformers_saves(
    original_format: bool, published: Path, tmp_path: Path, all_arrays
):
    source = published / "huggingface"
    model, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        source, dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    model.save_pretrained(
        tmp_path / "saved", max_shard_size="30KB", save_original_format=original_format
    )
    assert open_checkpoint(tmp_path / "saved").config == open_checkpoint(source).config
    saved = all_arrays(tmp_path / "saved")
    for name, array in all_arrays(source).items():
        np.testing.assert_array_equal(saved[name].view(np.uint16), array.view(np.uint16))
