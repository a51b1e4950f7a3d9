"""PEFT adapters in and out. Golden ones: made by PEFT 0.21 on transformers 5.23's PaliGemma."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.models.lora import LoRA, adapters, add_lora, merge_lora
from paligemma_jax.models.paligemma import PaliGemma, flatten, to_params
from paligemma_jax.models.quantization import quantize_stacked
from paligemma_jax.weights.peft import load_adapter, save_adapter
from paligemma_jax.weights.safetensors_io import read_header, write_tensors
from tests.goldens import GOLDEN, Golden, assert_close, hugging_face, hugging_face_images

Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]
TEXT = "base_model.model.model.language_model.layers"
PROJECTOR = "base_model.model.model.multi_modal_projector.linear"
WIDTH, DEPTH = 16, 3  # of the tiny model
ENDS = {  # ins, outs
    "self_attn.q_proj": (16, 32),
    "self_attn.k_proj": (16, 16),
    "self_attn.v_proj": (16, 16),
    "self_attn.o_proj": (32, 16),
    "mlp.gate_proj": (16, 24),
    "mlp.up_proj": (16, 24),
    "mlp.down_proj": (24, 16),
}


def golden_adapter(name: str, spelling: str = "v5") -> Path:
    return GOLDEN / "huggingface" / name / f"adapter_{spelling}"


def read(path: Path) -> Tensors:
    header = read_header(path / "adapter_model.safetensors")
    return {name: tensor.read() for name, tensor in header.items()}


def tensors(ends: list[str], rank: int = 2, layers: tuple[int, ...] = (0, 1, 2)) -> Tensors:
    """Random adapters of the tiny model's language layers."""
    rng, made = np.random.default_rng(0), {}
    for end in ends:
        ins, outs = ENDS[end]
        for layer in layers:
            key = f"{TEXT}.{layer}.{end}"
            made[f"{key}.lora_A.weight"] = rng.normal(size=(rank, ins)).astype(np.float32)
            made[f"{key}.lora_B.weight"] = rng.normal(size=(outs, rank)).astype(np.float32)
    return made


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes an adapter; of the configuration only what differs need be given."""

    def write(arrays: Mapping[str, np.ndarray], **config: Any) -> Path:
        path = tmp_path / f"adapter{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        usual = dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=["q_proj"])
        (path / "adapter_config.json").write_text(json.dumps(usual | config))
        write_tensors(path / "adapter_model.safetensors", arrays)
        return path

    return write


@jax.jit
def run(model: PaliGemma, images: jax.Array, tokens: jax.Array, mask_ar: jax.Array) -> jax.Array:
    return model(images, tokens, mask_ar)


def logits(golden: Golden, model: PaliGemma) -> jax.Array:
    patches = golden.config.img.num_patches
    text = (jnp.asarray(golden[x][:, patches:], jnp.int32) for x in ("input_ids", "token_type_ids"))
    return run(model, jnp.asarray(hugging_face_images(golden)[:1]), *text)


@pytest.mark.parametrize("name", ["pg1", "pg2"])
def test_golden_logits(name: str):
    golden = hugging_face(name)
    with np.load(GOLDEN / "huggingface" / name / "golden_lora.npz") as file:
        expected = file["logits"][:, golden.config.img.num_patches :, :256]
    model = load_adapter(golden.model(), golden_adapter(name))
    assert_close(logits(golden, model), expected)
    if name == "pg1":
        assert_close(logits(golden, merge_lora(model)), expected)
        same(load_adapter(golden.model(), golden_adapter(name, "old")), model)


def same(model: PaliGemma, other: PaliGemma) -> None:
    ours, theirs = (flatten(to_params(x)) for x in (model, other))
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)
    assert next(iter(adapters(model).values())).spec == next(iter(adapters(other).values())).spec


@pytest.mark.parametrize("spelling", ["v5", "old"])
def test_golden_adapters_come_out_as_they_went_in(spelling: str, tmp_path: Path):
    source = golden_adapter("pg1", spelling)
    model = load_adapter(hugging_face("pg1").model(), source)
    save_adapter(model, tmp_path / "out", base="some/where", old_names=spelling == "old")
    before, after = read(source), read(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    same(load_adapter(hugging_face("pg1").model(), tmp_path / "out"), model)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 8, {})
    assert config["base_model_name_or_path"] == "some/where"
    # PEFT asks whether the whole name of a module matches.
    targeted = re.compile(config["target_modules"])
    modules = {re.sub(r"^base_model\.model\.|\.lora_.*", "", name) for name in before}
    assert all(targeted.fullmatch(module) for module in modules)
    assert not targeted.fullmatch("model.vision_tower.encoder.layers.0.self_attn.out_proj")


ATTENTION = [end for end in ENDS if "attn" in end]
# What a configuration says, and the tensors that then belong to it.
READABLE: dict[str, tuple[dict[str, Any], Tensors]] = {
    "a list of endings": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*vision_tower.*"},
        tensors(["self_attn.q_proj", "self_attn.v_proj"]),
    ),
    "an expression of old names": (
        {"target_modules": r"language_model\.model\.layers\.\d+\.mlp\.(up|down)_proj"},
        tensors(["mlp.up_proj", "mlp.down_proj"]),
    ),
    "an expression of new names": (
        {"target_modules": r"^(?!.*vision).*self_attn\.[qkvo]_proj", "use_rslora": True},
        tensors(ATTENTION),
    ),
    "some layers": (
        {
            "target_modules": ["mlp.up_proj"],
            "layers_to_transform": [0, 2],
            "layers_pattern": "layers",
        },
        tensors(["mlp.up_proj"], layers=(0, 2)),
    ),
    "everything linear": (
        {"target_modules": "all-linear", "exclude_modules": ".*(vision|multi_modal).*"},
        tensors(list(ENDS)),
    ),
    "ranks and alphas of their own": (
        {
            "target_modules": ["language_model.layers.1.mlp.gate_proj", "up_proj"],
            "rank_pattern": {"up_proj": 3, "gate_proj": 1},
            "alpha_pattern": {r"layers.1.mlp.up_proj": 7.5},
        },
        tensors(["mlp.up_proj"], 3) | tensors(["mlp.gate_proj"], 1, layers=(1,)),
    ),
    "fields of other versions": (
        {
            "target_modules": ["down_proj"],
            "some_new_field": None,
            "megatron_core": "megatron.core",
            "loftq_config": {},
            "lora_dropout": 0.05,
            "init_lora_weights": "gaussian",
        },
        tensors(["mlp.down_proj"]),
    ),
}


@pytest.mark.parametrize("name", READABLE)
def test_configurations(name: str, tiny_model: PaliGemma, write: Write, tmp_path: Path):
    config, arrays = READABLE[name]
    model = load_adapter(tiny_model, write(arrays, **config))
    save_adapter(model, tmp_path / "out")
    again = read(tmp_path / "out")
    assert again.keys() == arrays.keys()
    for key, tensor in arrays.items():
        np.testing.assert_array_equal(again[key], tensor)
    second = load_adapter(tiny_model, tmp_path / "out")
    same(second, model)
    spec = next(iter(adapters(second).values())).spec
    assert spec.dropout == config.get("lora_dropout", 0)
    scales = np.concatenate([np.ravel(x.lora_scale[...]) for x in adapters(model).values()])
    expected = {4 / 2**0.5} if spec.rslora else {2.0}
    expected = {4 / 3, 7.5 / 3, 4.0} if "rank_pattern" in config else expected
    np.testing.assert_allclose(sorted({*scales.tolist()} - {0}), sorted(expected))


SPELLINGS: dict[str, tuple[str, str]] = {
    "as in training": (r"\.weight$", ".default.weight"),
    "without a prefix": (r"^base_model\.model\.", ""),
    "a prefix twice": (r"^", "base_model.model."),
    "transformers 4.51": (r"model\.language_model\.layers", "language_model.model.layers"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, tiny_model: PaliGemma, write: Write):
    arrays = tensors(["self_attn.q_proj"])
    config = {"target_modules": r".*language_model.*q_proj"}
    pattern, spelled = SPELLINGS[name]
    other = {re.sub(pattern, spelled, key): array for key, array in arrays.items()}
    assert other.keys() != arrays.keys()
    same(
        load_adapter(tiny_model, write(other, **config)),
        load_adapter(tiny_model, write(arrays, **config)),
    )


def test_tensors_trained_whole(tiny_model: PaliGemma, write: Write, tmp_path: Path):
    rng = np.random.default_rng(0)
    config = dict(target_modules=r".*language_model.*q_proj")
    weight, bias = rng.normal(size=(WIDTH, 12)), rng.normal(size=WIDTH)
    head = rng.normal(size=(70, WIDTH)).astype(np.float32)  # 6 rows of filler
    arrays = tensors(["self_attn.q_proj"]) | {
        f"{PROJECTOR}.weight": weight.astype(np.float32),
        f"{PROJECTOR}.modules_to_save.default.bias": bias.astype(np.float32),
        "base_model.model.lm_head.weight": head,
    }
    saved = ["multi_modal_projector", "lm_head"]
    model = load_adapter(tiny_model, write(arrays, **config, modules_to_save=saved))
    params, before = flatten(to_params(model)), flatten(to_params(tiny_model))
    np.testing.assert_array_equal(params["img/head/kernel"], weight.astype(np.float32).T)
    np.testing.assert_array_equal(params["img/head/bias"], bias.astype(np.float32))
    assert not model.config.llm.tie_embeddings
    np.testing.assert_array_equal(params["llm/lm_head/w"], head[:64])
    table = "llm/embedder/input_embedding"
    np.testing.assert_array_equal(params[table], before[table])
    assert before["img/head/bias"] is not params["img/head/bias"]
    with pytest.raises(ConfigError, match="llm/lm_head/w, nothing cannot be written whole"):
        save_adapter(model, tmp_path / "out", whole=["llm/lm_head/w", "nothing"])
    whole = ["img/head/kernel", "llm/layers/pre_ffw_norm/scale"]
    save_adapter(model, tmp_path / "out", whole=whole)
    again = load_adapter(tiny_model, tmp_path / "out")
    for path in ("img/head/kernel", "img/head/bias", "llm/layers/pre_ffw_norm/scale"):
        np.testing.assert_array_equal(flatten(to_params(again))[path], params[path])
    assert len(read(tmp_path / "out")) == 2 * DEPTH + 2 + DEPTH
    tied = tensors(["self_attn.q_proj"])
    tied["base_model.model.lm_head.weight"] = np.asarray(before[table])
    model = load_adapter(tiny_model, write(tied, **config, modules_to_save=["lm_head"]))
    assert model.config == tiny_model.config


def test_every_problem_is_named_at_once(tiny_model: PaliGemma, write: Write):
    arrays = tensors(["self_attn.q_proj", "self_attn.k_proj"])
    q = f"{TEXT}.0.self_attn.q_proj"
    del arrays[f"{TEXT}.1.self_attn.q_proj.lora_B.weight"]
    arrays[f"{q}.lora_A.weight"] = np.zeros((3, WIDTH), np.float32)
    arrays[f"{TEXT}.2.self_attn.q_proj.lora_B.weight"][0, 0] = np.nan
    arrays["base_model.model.lm_head.lora_A.weight"] = np.zeros((2, WIDTH), np.float32)
    arrays[f"{q}.lora_A.default.weight"] = arrays[f"{q}.lora_A.weight"]
    arrays[f"{q}.lora_A.other.weight"] = arrays[f"{q}.lora_A.weight"]
    arrays[f"{q}.lora_magnitude_vector"] = np.zeros(32, np.float32)
    path = write(arrays, target_modules=r".*language.*q_proj", modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError) as error:
        load_adapter(tiny_model, path)
    text = str(error.value)
    for line in (
        "unexpected  several adapters: default, other",
        "unexpected  base_model.model.lm_head.lora_A.weight (2, 16)",
        "lora_A.other.weight",
        r"lora_magnitude_vector (32,)",
        "missing     the tensors of 'lm_head', which modules_to_save names",
        "lora_A.weight: adapter (3, 16), model and adapter_config.json (2, 16)",
        "missing     language_model.layers.1.self_attn.q_proj.lora_B.weight (32, 2)",
        "language_model.layers.2.self_attn.q_proj.lora_B.weight is not finite",
        "language_model.layers.1.self_attn.k_proj.lora_A.weight: target_modules leaves it out",
    ):
        assert line in text, text
    assert f"Adapter {path} does not match the model (15 problems)" in text


REFUSED: dict[str, dict[str, Any]] = {
    "peft_type is 'LOHA'": {"peft_type": "LOHA"},
    "use_dora is True: DoRA": {"use_dora": True},
    "bias is 'all'": {"bias": "all"},
    "init_lora_weights is 'pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "r is 0": {"r": 0},
    "lora_alpha is '8'": {"lora_alpha": "8"},
    "a_new_idea is": {"a_new_idea": {"strength": 2}},
    "target_modules is '('": {"target_modules": "("},
    "rank_pattern is": {"rank_pattern": {"q_proj": 0.5}},
    "trainable_token_indices is": {"trainable_token_indices": [1, 2]},
}


def test_configurations_that_are_refused(tiny_model: PaliGemma, write: Write):
    together: dict[str, Any] = {}
    for config in REFUSED.values():
        together |= config
    with pytest.raises(CheckpointError, match=rf"\({len(REFUSED)} problems\)") as error:
        load_adapter(tiny_model, write({}, **together))
    assert all(problem in str(error.value) for problem in REFUSED), error.value


def test_what_cannot_be(tiny_model: PaliGemma, write: Write, tmp_path: Path):
    with pytest.raises(CheckpointError, match="adapter_config.json cannot be read"):
        load_adapter(tiny_model, tmp_path)
    with pytest.raises(CheckpointError, match="matches no layer"):
        load_adapter(tiny_model, write({}, target_modules=["nothing"]))
    path = write({})
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match="only the pickled adapter_model.bin"):
        load_adapter(tiny_model, path)
    with pytest.raises(ConfigError, match="no adapters to save.*add_lora"):
        save_adapter(tiny_model, tmp_path / "new")
    model = add_lora(tiny_model, LoRA(), nnx.Rngs(0))
    with pytest.raises(CheckpointError, match="exists already"):
        save_adapter(model, path)
    with pytest.raises(ConfigError, match="adapters already"):
        load_adapter(model, path)


def test_new_adapters_of_a_base_of_few_bits(tiny_model: PaliGemma, tmp_path: Path):
    """Trained on integers, merged into the floats that they were made of."""
    lora = LoRA(rank=2, alpha=6, dropout=0.1, targets=r"llm/.*/(kv_einsum/v|linear)|img/head")
    model = add_lora(quantize_stacked(tiny_model, "int8"), lora, nnx.Rngs(0))
    save_adapter(model, tmp_path / "new")
    found = read(tmp_path / "new")
    ends = {key.partition("layers.")[2] for key in found} - {""}
    assert ends == {
        f"{layer}.{end}.lora_{side}.weight"
        for layer in range(DEPTH)
        for end in ("self_attn.v_proj", "mlp.down_proj")
        for side in "AB"
    }
    assert f"{PROJECTOR}.lora_A.weight" in found and len(found) == 4 * DEPTH + 2
    loaded = load_adapter(tiny_model, tmp_path / "new")
    for path, layer in adapters(model).items():
        other = adapters(loaded)[path]
        for name in ("lora_a", "lora_b", "lora_scale"):
            np.testing.assert_array_equal(getattr(layer, name)[...], getattr(other, name)[...])
    merge_lora(loaded)
