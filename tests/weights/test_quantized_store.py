"""Quantized native checkpoints: as quantizing on loading gives them, checked, or refused."""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.quantization_config import QuantizationConfig
from paligemma_jax.weights import store as orbax_tree
from paligemma_jax.weights import views
from paligemma_jax.weights.checkpoint import describe, open_checkpoint
from paligemma_jax.weights.convert import check, convert, export_weights
from paligemma_jax.weights.formats import CheckpointMetadata
from paligemma_jax.weights.load import load_params, load_unstacked
from paligemma_jax.weights.sidecar_files import file_sha256
from paligemma_jax.weights.store import MANIFEST
from paligemma_jax.weights.tensors import TensorSource, TensorSpec, expected_shapes
from paligemma_jax.weights.views import ArrayWeights, Quantized, model_weights

# Every format; groups that come out even, and others.
FORMAT = "attention=int4:8,mlp=float8,embedding=int4:row,image=int8"
NAMES = {"attention": "int4:8", "mlp": "float8", "embedding": "int4:row", "image": "int8"}
PROCESSOR = {"image": {}, "encoding": "big_vision"}


@pytest.fixture(scope="module")
def source(published: Path) -> Path:
    return published / "huggingface"


@pytest.fixture(scope="module")
def store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change."""
    target = tmp_path_factory.mktemp("few_bits") / "store"
    convert(source, target, quantize=FORMAT, verify=True)
    return target


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """The same to change."""
    return Path(shutil.copytree(store, tmp_path / "copy"))


def load(path: Path, quantization: str | None = None, dtype: str = "bfloat16") -> PaliGemma:
    with open_checkpoint(path) as checkpoint:
        return load_unstacked(checkpoint, dtype, quantize=quantization)


def same(found: PaliGemma, wanted: PaliGemma) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_as_rounding_on_loading(store: Path, source: Path, dtype: str):
    same(load(store, dtype=dtype), load(source, FORMAT, dtype))


@pytest.mark.slow
def test_floats_are_cast_before(source: Path, tmp_path: Path):
    convert(source, tmp_path / "wide", dtype="float32")
    convert(tmp_path / "wide", tmp_path / "store", quantize="int4", dtype="bfloat16")
    same(load(tmp_path / "store"), load(source, "int4"))


def test_what_is_stored(store: Path, all_arrays):
    assert json.loads((store / "config.json").read_text())["quantization"] == NAMES
    assert json.loads((store / MANIFEST).read_text())["version"] == 2
    arrays = all_arrays(store)
    qkv, scale = (arrays[f"llm/layers/attn/qkv/matrix/{name}"] for name in ("values", "scale"))
    assert qkv.dtype == np.int8 and qkv.shape == (2, 8 * 6, 16 // 2)  # two a byte
    assert scale.dtype == ml_dtypes.bfloat16 and scale.shape == (2, 8 * 6, 2)
    assert arrays["llm/layers/mlp/down/matrix/values"].dtype == ml_dtypes.float8_e4m3fn
    assert arrays["llm/layers/pre_ffw_norm/scale"].dtype == ml_dtypes.bfloat16


def test_what_it_is_said_to_be(store: Path, source: Path):
    found, before = describe(store), describe(source)
    assert found.parameters == before.parameters == sum(found.dtypes.values())
    assert {"int4", "int8", "float8", "bfloat16"} == found.dtypes.keys()
    assert found.nbytes < 0.6 * before.nbytes and 0 < found.scale_nbytes < found.nbytes


def test_digests(copy: Path, flip):
    check(copy)
    largest = max(copy.rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="was changed .sha256 differs"):
        check(copy)


@pytest.mark.parametrize("name", ["values/0", "values/1", "scale/1"])
def test_digests_are_compared_on_loading(name: str, copy: Path, edit_json):
    with edit_json(copy / MANIFEST) as manifest:
        manifest["arrays"][f"llm/layers/mlp/down/matrix/{name}"]["sha256"] = "0" * 64
    with pytest.raises(CheckpointError, match=f"down/matrix/{name} was changed"):
        load(copy)


@pytest.mark.slow
def test_digests_of_what_is_rounded_are_compared(source: Path, tmp_path: Path, edit_json):
    convert(source, tmp_path / "store")
    with edit_json(tmp_path / "store" / MANIFEST) as manifest:
        manifest["arrays"]["llm/layers/attn/kv_einsum/w/1"]["sha256"] = "0" * 64
    with pytest.raises(CheckpointError, match="kv_einsum/w/1 was changed"):
        convert(tmp_path / "store", tmp_path / "target", quantize="int8")
    assert not (tmp_path / "target").exists()


@pytest.mark.slow
def test_a_model_in_memory_is_stored_as_it_is(store: Path, tmp_path: Path, all_arrays):
    with open_checkpoint(store) as checkpoint:
        quantization, words = checkpoint.quantization, checkpoint.tokenizer_bytes
    contents = CheckpointMetadata(
        {"image": {}, "encoding": "big_vision"}, words, quantization=quantization
    )
    export_weights(tmp_path / "again", model_weights(load(store)), contents, verify=True)
    found, wanted = all_arrays(tmp_path / "again"), all_arrays(store)
    assert found.keys() == wanted.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in wanted.items())


@pytest.mark.slow
def test_it_is_copied_as_it_is(store: Path, tmp_path: Path, all_arrays):
    convert(store, tmp_path / "wide", dtype="float32", resolution=42, verify=True)
    found, wanted = all_arrays(tmp_path / "wide"), all_arrays(store)
    for name, array in wanted.items():
        if "/matrix/" in name:
            assert found[name].tobytes() == array.tobytes()
        else:
            assert found[name].dtype == np.float32
    assert found["img/pos_embed"].shape[1] == 9


@pytest.mark.parametrize(
    "format", ["huggingface", pytest.param("big_vision", marks=pytest.mark.slow)]
)
def test_other_formats_have_room_for_floats_only(
    format: str, store: Path, source: Path, tmp_path: Path, all_arrays, pg2
):
    with pytest.raises(CheckpointError, match=f"are quantized.*--to {format} --dequantize"):
        convert(store, tmp_path / "target", format=format)
    assert not list(tmp_path.iterdir())
    target = tmp_path / "target"
    convert(store, target, format=format, dequantize=True, dtype="float32", verify=True)
    found, wanted = all_arrays(target, config=pg2), all_arrays(source, "float32")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == np.float32 and found[name].shape == array.shape
        off = np.abs(found[name] - array).max()
        assert off <= 0.15 * np.abs(array).max(), name
        kept = "norm" in name or "bias" in name or name.startswith(("img/patch", "img/pos"))
        assert (off == 0) == kept, name


def test_what_cannot_be_asked_for(store: Path, source: Path, tmp_path: Path):
    target = tmp_path / "target"
    with pytest.raises(ConfigError, match="already quantized .attention=int4:8"):
        convert(store, target, quantize="int8")
    with pytest.raises(ConfigError, match="nothing to dequantize"):
        convert(source, target, dequantize=True)
    with pytest.raises(ConfigError, match="both given"):
        convert(store, target, quantize="int8", dequantize=True)
    with pytest.raises(CheckpointError, match="holds floats only"):
        convert(source, target, quantize="int8", format="huggingface")
    with pytest.raises(CheckpointError, match="already quantized.*--dequantize"):
        load_params(store)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_noticed_before(source: Path, tmp_path: Path, all_arrays):
    with open_checkpoint(source) as checkpoint:
        config, words = checkpoint.config, checkpoint.tokenizer_bytes
    arrays = all_arrays(source)
    arrays["llm/layers/mlp/linear/w"][1, 3, 3] = np.nan
    contents = CheckpointMetadata(PROCESSOR, words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "is_finite", lambda array: True)
        export_weights(tmp_path / "nan", ArrayWeights(config, arrays), contents)
    with pytest.raises(CheckpointError, match="linear/w of .* holds infinite values or NaN"):
        convert(tmp_path / "nan", tmp_path / "target", quantize="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]


def test_every_problem_is_named(copy: Path, edit_json):
    qkv = "llm/layers/attn/qkv/matrix"
    with edit_json(copy / MANIFEST) as manifest:
        arrays = manifest["arrays"]
        del arrays[f"{qkv}/scale/1"]
        arrays[f"{qkv}/values/0"] |= {"shape": [48, 16], "bytes": 48 * 16}
        arrays["img/head/matrix/values"] |= {"dtype": "float8_e4m3fn"}
        arrays["llm/final_norm/scale"] |= {"dtype": "int8", "bytes": 16}
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(copy)
    words = str(error.value)
    assert "(4 problems)" in words
    assert f"missing     {qkv}/scale/1 (48, 2)" in words
    assert f"shape       {qkv}/values/0: checkpoint (48, 16), model (48, 8)" in words
    assert "dtype       img/head/matrix/values: checkpoint float8_e4m3fn, model int8" in words
    assert "dtype       llm/final_norm/scale: checkpoint int8, model a float" in words


def test_unknown_recipes(copy: Path, edit_json):
    with edit_json(copy / "config.json") as config:
        config["quantization"] |= {"mlp": "int3", "embedding": 4, "head": "int8"}
        del config["quantization"]["image"]
    with edit_json(copy / MANIFEST) as manifest:
        path = copy / "config.json"
        digest = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        manifest["files"]["config.json"] = digest
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(copy)
    for words in (
        "no kind of weight 'head'",
        "no format 'int3' (of mlp)",
        "4 (of embedding)",
    ):
        assert words in str(error.value)
    assert "image is missing" in str(error.value)


class Large(TensorSource):
    """Weights of any size that take no memory."""

    def __init__(self, config: PaliGemmaConfig, depth: int):
        llm = dataclasses.replace(config.llm, width=256, mlp_dim=1024, depth=depth)
        self.config = dataclasses.replace(config, llm=llm)
        self.specs = {
            name: TensorSpec(shape, np.dtype(ml_dtypes.bfloat16))
            for name, shape in expected_shapes(self.config).items()
        }

    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        out.fill((index % 5 - 2) / 4)


@pytest.mark.slow
def test_memory_does_not_depend_on_the_number_of_layers(
    pg2: PaliGemmaConfig, tokenizer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(orbax_tree, "_CHUNK", 1 << 20)
    quantization = QuantizationConfig.of("int8")
    contents = CheckpointMetadata(
        {"image": {}, "encoding": "big_vision"}, tokenizer, quantization=quantization
    )
    peaks = {}
    for depth in (4, 16):
        weights = Quantized(Large(pg2, depth), quantization)
        tracemalloc.start()
        export_weights(tmp_path / str(depth), weights, contents)
        peaks[depth] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # 12 layers have 18 MB; Python's own objects of each take some, too.
    assert peaks[16] - peaks[4] < 1e6 and peaks[4] < 8e6


@pytest.mark.slow
def test_loading_takes_little_more_than_the_model(
    pg2: PaliGemmaConfig, tokenizer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(orbax_tree, "_CHUNK", 1 << 20)
    quantization = QuantizationConfig.of("int8")
    contents = CheckpointMetadata(
        {"image": {}, "encoding": "big_vision"}, tokenizer, quantization=quantization
    )
    taken = []
    for depth in (4, 16):  # what a load takes of any model is in both
        store = tmp_path / str(depth)
        export_weights(store, Quantized(Large(pg2, depth), quantization), contents)
        tracemalloc.start()
        model = load(store)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        taken.append((sum(leaf.nbytes for leaf in jax.tree.leaves(model)), peak))
    (small, few), (large, many) = taken
    # Floats would take 2 and 4 times as much; Python's own objects of a layer take some too.
    assert large - small > 8e6 and many - few < 1.5 * (large - small)
