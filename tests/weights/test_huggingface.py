import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.huggingface import canonical_key
from paligemma_jax.weights.safetensors_io import read_header
from paligemma_jax.weights.sidecar_files import with_text_length
from paligemma_jax.weights.tensors import BFLOAT16

GOLDEN = ["pg1", "pg2", "pg2_28b", "pg2_sw"]
# Canonical key -> the layouts found in the wild.
LAYOUTS: dict[str, Callable[[str], str]] = {
    "hub_old": lambda key: in_layout(key, "language_model.model.", "vision_tower.vision_model."),
    "v4_52": lambda key: (
        "model." * (key != "lm_head.weight")
        + in_layout(key, "language_model.", "vision_tower.vision_model.")
    ),
    "v5": lambda key: "model." * (key != "lm_head.weight") + key,
    "v5_default_save": lambda key: in_layout(key, "language_model.model.", "vision_tower."),
}


def in_layout(key: str, language: str, vision: str) -> str:
    if key == "lm_head.weight" and language == "language_model.model.":
        return "language_model.lm_head.weight"
    for prefix, name in (("language_model.", language), ("vision_tower.", vision)):
        if key.startswith(prefix):
            return name + key.removeprefix(prefix)
    return key


def golden_tensors(directory: Path) -> dict[str, np.ndarray]:
    tensors = read_header(directory / "model.safetensors")
    return {canonical_key(name): tensor.read() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_configurations(name: str, golden: Path):
    checkpoint = open_checkpoint(golden / f"huggingface/{name}/hub_old")
    llm, img = checkpoint.config.llm, checkpoint.config.img
    assert (img.image_size, img.width, img.depth, img.mlp_dim, img.num_heads) == (28, 48, 2, 80, 4)
    assert llm.vocab_size == 256  # of 320 rows
    assert llm.sliding_window is None and llm.tie_embeddings
    caps = (llm.attn_logit_softcap, llm.final_logit_softcap)
    assert (caps, llm.post_norms) == (((50.0, 30.0), True) if name != "pg1" else ((0, 0), False))
    scales = {"pg1": 16, "pg2": 24, "pg2_28b": 16, "pg2_sw": 24}
    assert llm.query_scale == scales[name] ** -0.5
    assert checkpoint.origin["sliding_window"] == {"pg1": None, "pg2_sw": 6}.get(name, 4096)


@pytest.mark.parametrize("name", ["pg1", "pg2"])
def test_tensors_are_in_the_models_layout(name: str, golden: Path, all_arrays):
    """Each transformation spelled out once more, element by element."""
    directory = golden / f"huggingface/{name}/hub_old"
    theirs = golden_tensors(directory)
    ours = all_arrays(directory)
    c = open_checkpoint(directory).config.llm
    layer, gemma = "language_model.layers.2", "llm/layers"
    heads = theirs[f"{layer}.self_attn.q_proj.weight"].reshape(c.num_heads, c.head_dim, c.width)
    np.testing.assert_array_equal(ours[f"{gemma}/attn/q_einsum/w"][2, 3], heads[3].T)
    for part, projection in enumerate("kv"):
        values = theirs[f"{layer}.self_attn.{projection}_proj.weight"][-c.head_dim :]
        np.testing.assert_array_equal(ours[f"{gemma}/attn/kv_einsum/w"][2, part, -1], values.T)
    values = theirs[f"{layer}.self_attn.o_proj.weight"][:, : c.head_dim]
    np.testing.assert_array_equal(ours[f"{gemma}/attn/attn_vec_einsum/w"][2, 0], values.T)
    for part, projection in enumerate(("gate", "up")):
        values = theirs[f"{layer}.mlp.{projection}_proj.weight"]
        np.testing.assert_array_equal(ours[f"{gemma}/mlp/gating_einsum/w"][2, part], values.T)
    norm = "post_attention_norm" if c.post_norms else "pre_ffw_norm"  # one name, two roles
    values = theirs[f"{layer}.post_attention_layernorm.weight"]
    np.testing.assert_array_equal(ours[f"{gemma}/{norm}/scale"][2], values)
    values = theirs["vision_tower.embeddings.patch_embedding.weight"]  # out, in, height, width
    kernel = ours["img/patch_embed/kernel"]
    assert all(kernel[3, 5, 2, i] == values[i, 2, 3, 5] for i in range(48))
    layer = "vision_tower.encoder.layers.1.self_attn"
    values = theirs[f"{layer}.k_proj.weight"].reshape(4, 12, 48)
    np.testing.assert_array_equal(ours["img/blocks/attn/k/kernel"][1, :, 2], values[2].T)
    values = theirs[f"{layer}.out_proj.weight"][:, 12:24]
    np.testing.assert_array_equal(ours["img/blocks/attn/out/kernel"][1, 1], values.T)
    np.testing.assert_array_equal(
        ours["llm/embedder/input_embedding"],
        theirs["language_model.embed_tokens.weight"][:256],
    )


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["pg1", "pg2", "pg2_28b"])
def test_all_layouts_are_the_same_tree(
    name: str, layout: str, head: bool, golden: Path, tmp_path: Path, all_arrays, safetensors
):
    directory = golden / f"huggingface/{name}/hub_old"
    tensors = golden_tensors(directory)
    if head:
        tensors["lm_head.weight"] = tensors["language_model.embed_tokens.weight"]
    shutil.copy(directory / "config.json", tmp_path)
    safetensors(tmp_path / "model.safetensors", {LAYOUTS[layout](k): t for k, t in tensors.items()})
    assert open_checkpoint(tmp_path).config == open_checkpoint(directory).config
    same(all_arrays(tmp_path), all_arrays(directory))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.dtype == b[name].dtype and array.tobytes() == b[name].tobytes(), name


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    """A Hugging Face directory to change."""
    return Path(shutil.copytree(published / "huggingface", tmp_path / "copy"))


def test_both_formats_hold_the_same_weights(published: Path, pg2: PaliGemmaConfig, all_arrays):
    assert open_checkpoint(published / "huggingface").config == pg2
    same(all_arrays(published / "huggingface"), all_arrays(published / "model.npz"))
    bfloat16 = all_arrays(published / "huggingface")
    for name, array in all_arrays(published / "huggingface", "float32").items():
        stored = bfloat16[name]
        assert stored.dtype == BFLOAT16 and array.dtype == np.float32
        np.testing.assert_array_equal(array, stored.astype(np.float32))


def test_shards(published: Path, tmp_path: Path, pg2, synthetic: ModuleType, all_arrays):
    synthetic.write_hugging_face(tmp_path, pg2, shard_bytes=9_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    same(all_arrays(tmp_path), all_arrays(published / "huggingface"))


def test_an_untied_head_is_kept(golden: Path, tmp_path: Path, all_arrays, safetensors, edit_json):
    directory = golden / "huggingface/pg1/hub_old"
    tensors = golden_tensors(directory)
    head = tensors["language_model.embed_tokens.weight"].copy()
    head[300] += 1  # only filler differs: still tied
    shutil.copy(directory / "config.json", tmp_path)
    path = tmp_path / "model.safetensors"
    safetensors(path, tensors | {"lm_head.weight": head})
    assert open_checkpoint(tmp_path).config.llm.tie_embeddings
    head[200, 3] += 1
    safetensors(path, tensors | {"lm_head.weight": head})
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.config.llm.tie_embeddings
    np.testing.assert_array_equal(all_arrays(tmp_path)["llm/lm_head/w"], head[:256])
    with edit_json(tmp_path / "config.json") as config:
        config["tie_word_embeddings"] = False
    safetensors(path, tensors)
    with pytest.raises(CheckpointError, match="missing     lm_head.weight"):
        open_checkpoint(tmp_path)


def test_constants_of_old_versions_are_passed_over(
    golden: Path, tmp_path: Path, all_arrays, safetensors
):
    directory = golden / "huggingface/pg1/hub_old"
    extra = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8),
        "vision_tower.vision_model.embeddings.position_ids": np.zeros((1, 4)),
    }
    shutil.copy(directory / "config.json", tmp_path)
    safetensors(tmp_path / "model.safetensors", golden_tensors(directory) | extra)
    same(all_arrays(tmp_path), all_arrays(directory))


def test_every_misfit_is_named(golden: Path, tmp_path: Path, safetensors):
    directory = golden / "huggingface/pg2/hub_old"
    tensors = golden_tensors(directory)
    norm, fc1 = "language_model.layers.1.input_layernorm", "vision_tower.encoder.layers.0.mlp.fc1"
    tensors[f"{norm}.weigth"] = tensors.pop(f"{norm}.weight")
    tensors[f"{fc1}.bias"] = np.zeros(84, np.float32)
    shutil.copy(directory / "config.json", tmp_path)
    safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert "(3 problems)" in str(error.value)
    assert f"missing     {norm}.weight (64,) (is it {norm}.weigth?)" in str(error.value)
    assert f"unexpected  {norm}.weigth (64,)" in str(error.value)
    assert f"shape       {fc1}.bias: checkpoint (84,), model (80,)" in str(error.value)


def test_a_table_without_rows(golden: Path, tmp_path: Path, safetensors):
    directory = golden / "huggingface/pg1/hub_old"
    tensors = golden_tensors(directory)
    tensors["language_model.embed_tokens.weight"] = np.array(1, np.float32)
    shutil.copy(directory / "config.json", tmp_path)
    safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight: checkpoint \(\), model"):
        open_checkpoint(tmp_path)


def test_one_tensor_under_two_names(golden: Path, tmp_path: Path, safetensors):
    directory = golden / "huggingface/pg1/hub_old"
    tensors = golden_tensors(directory)
    tensors["model.language_model.norm.weight"] = np.zeros(64)
    shutil.copy(directory / "config.json", tmp_path)
    safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match="duplicate   model.language_model.norm.weight and"):
        open_checkpoint(tmp_path)


def test_a_given_config_replaces_the_files(published: Path, pg2: PaliGemmaConfig):
    given = dataclasses.replace(pg2, llm=dataclasses.replace(pg2.llm, sliding_window=6))
    assert open_checkpoint(published / "huggingface", config=given).config == given


def test_a_table_shorter_than_the_configs(copy: Path, edit_json):
    with edit_json(copy / "config.json") as config:
        config["image_token_index"] = 10**6  # no filler rows then
    assert open_checkpoint(copy).config.llm.vocab_size == 1600 + 64


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("paligemma-3b-pt-224", 128),
        ("paligemma2-3b-mix-448", 512),
        ("paligemma2-28b-mix-224", 256),
        ("paligemma-3b-ft-docvqa-896", 32),
        ("models--google--paligemma-3b-mix-224/snapshots/0a1b", 256),
        ("somewhere", 128),
    ],
)
def test_text_length_of_published_names(name: str, length: int):
    config = VARIANTS[name.split("--")[-1].split("/")[0]] if name != "somewhere" else None
    config = config or VARIANTS["paligemma-3b-mix-224"]
    unknown = dataclasses.replace(config, text_length=1)
    assert with_text_length(unknown, Path("/data") / name).text_length == length
    tiny = dataclasses.replace(unknown, llm=dataclasses.replace(config.llm, depth=1))
    assert with_text_length(tiny, Path("/data") / name).text_length == 1


def test_pickled_weights_are_refused(copy: Path):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match="only the pickled pytorch_model.bin, which is refused"
    ):
        open_checkpoint(copy)


def test_a_missing_config(copy: Path):
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json cannot be read: No such file"):
        open_checkpoint(copy)


def test_an_adapter_is_no_model(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError, match="PEFT adapter, not a whole model"):
        open_checkpoint(tmp_path)
