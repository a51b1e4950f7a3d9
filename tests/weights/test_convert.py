"""Every format written from every other, and nothing lost on the way."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.models.inference_layout import unstack_layers
from paligemma_jax.models.paligemma import flatten, from_params, nest
from paligemma_jax.models.quantization import quantize_stacked
from paligemma_jax.processing.processor import Processor
from paligemma_jax.weights.big_vision import big_vision_name
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.convert import check, convert, export_weights
from paligemma_jax.weights.formats import CheckpointMetadata
from paligemma_jax.weights.huggingface import HuggingFace
from paligemma_jax.weights.load import load_params
from paligemma_jax.weights.tensors import CHUNK_ROWS, expected_shapes
from paligemma_jax.weights.views import ArrayWeights, model_weights


@pytest.mark.parametrize("kind", ["big_vision", "huggingface"])
def test_a_converted_directory_is_self_contained(
    kind: str, published: Path, tmp_path: Path, all_arrays
):
    root = shutil.copytree(published, tmp_path / "source")
    source = root / "model.npz" if kind == "big_vision" else root / "huggingface"
    arrays = all_arrays(source)
    seen = []
    convert(source, tmp_path / "store", progress=lambda *step: seen.append(step))
    shutil.rmtree(root)
    with open_checkpoint(tmp_path / "store") as checkpoint:
        assert checkpoint.origin["kind"] == kind
        assert checkpoint.tokenizer is not None
        processor = Processor.from_dict(checkpoint.processor_settings, checkpoint.tokenizer)
        method = "bilinear-antialias-truncated" if kind == "big_vision" else "bicubic-pil"
        assert (processor.image.size, processor.image.method) == (28, method)
        assert processor.encoding == kind
        assert checkpoint.config.llm.final_logit_softcap == (0.0 if kind == "big_vision" else 30.0)
        stored = {n: checkpoint.read(n, s.dtype) for n, s in checkpoint.specs.items()}
    assert all(stored[name].tobytes() == array.tobytes() for name, array in arrays.items())
    total = sum(array.nbytes for array in arrays.values())
    assert [step[1] for step in seen] == sorted(step[1] for step in seen)
    assert seen[0][1:] == (0, total) and seen[-1] == ("", total, total)


def test_a_store_converts_to_a_store(published: Path, tmp_path: Path):
    convert(published / "huggingface", tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "second")
    first, second = (open_checkpoint(tmp_path / name) for name in ("first", "second"))
    assert first.origin == second.origin
    assert (tmp_path / "first/tokenizer.model").read_bytes() == second.tokenizer_bytes


def test_a_tokenizer_is_needed(published: Path, tmp_path: Path, tokenizer: bytes):
    source = Path(shutil.copy(published / "model.npz", tmp_path))
    with pytest.raises(CheckpointError, match="no tokenizer beside .* --tokenizer tokenizer.model"):
        convert(source, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]
    (tmp_path / "words.model").write_bytes(tokenizer)
    convert(source, tmp_path / "store", tokenizer=tmp_path / "words.model")
    assert open_checkpoint(tmp_path / "store").tokenizer_bytes == tokenizer


def test_big_visions_names_of_the_tokenizer(published: Path, tmp_path: Path, tokenizer: bytes):
    source = Path(shutil.copy(published / "model.npz", tmp_path))
    (tmp_path / "paligemma_tokenizer.model").write_bytes(tokenizer)
    assert open_checkpoint(source).tokenizer_bytes == tokenizer


def test_pieces_and_rows_must_be_equal(published: Path, tmp_path: Path, synthetic: ModuleType):
    (tmp_path / "other.model").write_bytes(synthetic.make_tokenizer(1700))
    with pytest.raises(CheckpointError, match=r"1,700 pieces.*1,600 embedding rows"):
        convert(published / "model.npz", tmp_path / "store", tokenizer=tmp_path / "other.model")
    assert not (tmp_path / "store").exists()


def test_gemmas_tokenizer_gets_the_missing_pieces(
    published: Path, tmp_path: Path, golden: Path, pg2, synthetic: ModuleType
):
    gemma = next(golden.rglob("tiny_gemma.model"), None)
    if gemma is None:
        pytest.skip("no golden tokenizer")
    llm = dataclasses.replace(pg2.llm, vocab_size=1200 + 1024 + 128)
    synthetic.write_hugging_face(tmp_path / "hf", dataclasses.replace(pg2, llm=llm))
    shutil.copy(gemma, tmp_path / "hf/tokenizer.model")
    convert(tmp_path / "hf", tmp_path / "store")
    tokenizer = open_checkpoint(tmp_path / "store").tokenizer
    assert tokenizer is not None and (tokenizer.loc_start, tokenizer.seg_start) == (1200, 2224)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_weights_must_be_finite(
    dtype: str, value: float, published: Path, tmp_path: Path, all_arrays, npz
):
    arrays = all_arrays(published / "model.npz", dtype)
    arrays["llm/layers/mlp/linear/w"][1, 2, 3] = value
    path = npz({big_vision_name(name): array for name, array in arrays.items()})
    with pytest.raises(CheckpointError, match="mlp/linear/w of .* holds infinite values or NaN"):
        convert(path, tmp_path / "store", tokenizer=published / "tokenizer.model")
    assert not (tmp_path / "store").exists()


FORMATS = ("orbax", "huggingface", "big_vision")
ROWS = CHUNK_ROWS + 500  # so that the table of tokens has two pieces
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def config(pg2: PaliGemmaConfig) -> PaliGemmaConfig:
    llm = dataclasses.replace(pg2.llm, vocab_size=ROWS, final_logit_softcap=0.0)
    return dataclasses.replace(pg2, llm=llm)


@pytest.fixture(scope="module")
def words(synthetic: Any) -> bytes:
    return synthetic.make_tokenizer(ROWS)


def draw(config: PaliGemmaConfig, dtype: str, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = expected_shapes(config).items()
    kind = jax.dtypes.canonicalize_dtype(dtype)
    return {name: rng.normal(size=shape).astype(kind) for name, shape in shapes}


def contents(words: bytes | None) -> CheckpointMetadata:
    image = {"size": 28, "method": "bilinear-antialias-truncated"}
    return CheckpointMetadata({"image": image, "encoding": "big_vision"}, words)


@pytest.fixture(scope="module")
def written(
    config: PaliGemmaConfig, words: bytes, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same bfloat16 weights in every format; do not change."""
    root = tmp_path_factory.mktemp("written")
    weights = ArrayWeights(config, draw(config, "bfloat16"))
    for format in FORMATS:
        chosen = HuggingFace(shard_bytes=10_000) if format == "huggingface" else format
        export_weights(root / format, weights, contents(words), chosen, verify=True)
    assert sorted(path.name for path in root.iterdir()) == sorted(FORMATS)
    return {format: root / format for format in FORMATS}


def same(a: Arrays, b: Arrays) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.dtype == b[name].dtype, name
        assert array.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_every_direction_keeps_every_bit(
    source: str, target: str, written: dict[str, Path], config, tmp_path: Path, all_arrays
):
    convert(written[source], tmp_path / "target", format=target, verify=True)
    same(all_arrays(tmp_path / "target"), draw(config, "bfloat16"))
    check(tmp_path / "target")
    with open_checkpoint(tmp_path / "target") as checkpoint:
        assert checkpoint.config == config
        tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    text = "a cat <loc0012>\n<seg003>  é"
    with open_checkpoint(written[source]) as checkpoint:
        assert checkpoint.tokenizer is not None
        assert tokenizer.encode(text) == checkpoint.tokenizer.encode(text)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_the_way_round_in_other_dtypes(
    dtype: str, pg1: PaliGemmaConfig, tokenizer: bytes, tmp_path: Path, all_arrays
):
    arrays = draw(pg1, dtype)
    paths = [tmp_path / name for name in ("a.npz", "b", "c", "d.npz")]
    export_weights(paths[0], ArrayWeights(pg1, arrays), contents(None), "big_vision")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer)
    for source, target, format in zip(
        paths, paths[1:], ("huggingface", "orbax", "big_vision"), strict=False
    ):
        convert(source, target, format=format)
        same(all_arrays(target), arrays)
    assert paths[0].read_bytes() == paths[3].read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_another_dtype_and_resolution(
    format: str, written: dict[str, Path], tmp_path: Path, all_arrays
):
    target = tmp_path / "target"
    options: dict[str, Any] = dict(dtype="float32", resolution=56)
    convert(written["huggingface"], target, format=format, verify=True, **options)
    _, params = load_params(written["huggingface"], **options)
    same(all_arrays(target), {n: np.asarray(a) for n, a in flatten(params).items()})
    with open_checkpoint(target) as checkpoint:
        assert checkpoint.config.img.image_size == 56
        assert checkpoint.processor_settings["image"]["size"] == 56


def test_stacked_and_unrolled_models(
    pg2: PaliGemmaConfig, tokenizer: bytes, tmp_path: Path, all_arrays
):
    arrays = draw(pg2, "float32")
    tree = jax.tree.map(jax.numpy.asarray, nest(arrays))
    stacked = from_params(pg2, tree, jax.numpy.float32)
    for name, model in {"stacked": stacked, "unrolled": unstack_layers(stacked)}.items():
        for format in FORMATS:
            target = tmp_path / name / format
            export_weights(target, model_weights(model), contents(tokenizer), format)
            same(all_arrays(target, config=pg2), arrays)
    with pytest.raises(ConfigError, match="stacked quantized one.*save_adapter"):
        model_weights(quantize_stacked(stacked, "int8"))


def test_files_of_a_hugging_face_directory(written: dict[str, Path], config: PaliGemmaConfig):
    directory = written["huggingface"]
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert "language_model.model.layers.1.mlp.down_proj.weight" in index["weight_map"]
    assert "vision_tower.vision_model.post_layernorm.bias" in index["weight_map"]
    for name in ("preprocessor_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        assert json.loads((directory / name).read_text())
    values = json.loads((directory / "config.json").read_text())
    assert values["image_token_index"] == ROWS and values["text_config"]["vocab_size"] % 64 == 0
    assert values["text_config"]["final_logit_softcapping"] is None
    added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    assert (added[-1]["id"], added[-1]["content"]) == (ROWS, "<image>")


def test_filler_rows_are_the_mean(written: dict[str, Path], config: PaliGemmaConfig):
    from paligemma_jax.weights.safetensors_io import read_tensors

    key = "language_model.model.embed_tokens.weight"
    table = read_tensors(written["huggingface"])[key].read().astype(np.float32)
    assert len(table) == 64 * -(-(ROWS + 1) // 64)
    mean = table[:ROWS].mean(axis=0)
    np.testing.assert_allclose(table[ROWS:], np.tile(mean, (len(table) - ROWS, 1)), rtol=0.01)
    states = np.random.default_rng(0).normal(size=(50, table.shape[1]))
    assert (states @ table.T).argmax(axis=1).max() < ROWS


def test_a_head_of_its_own(pg2: PaliGemmaConfig, tokenizer: bytes, tmp_path: Path, all_arrays):
    llm = dataclasses.replace(pg2.llm, tie_embeddings=False)
    config = dataclasses.replace(pg2, llm=llm)
    arrays = draw(config, "bfloat16")
    weights = ArrayWeights(config, arrays)
    export_weights(tmp_path / "hf", weights, contents(tokenizer), "huggingface", verify=True)
    convert(tmp_path / "hf", tmp_path / "store", verify=True)
    same(all_arrays(tmp_path / "store"), arrays)
    with pytest.raises(CheckpointError, match="an output head of their own"):
        convert(tmp_path / "store", tmp_path / "bv.npz", format="big_vision")
    assert not (tmp_path / "bv.npz").exists()


def test_published_tokenizer_files_are_copied(
    written: dict[str, Path], tmp_path: Path, words: bytes
):
    source = Path(shutil.copytree(written["huggingface"], tmp_path / "source"))
    settings = source / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("GemmaTokenizer", "GemmaTokenizerFast"))
    convert(source, tmp_path / "copy", format="huggingface")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    (source / "tokenizer.model").unlink()  # as transformers 5 leaves it
    convert(source, tmp_path / "again", format="huggingface")
    assert (tmp_path / "again/tokenizer.model").is_file()


def test_the_window_of_the_file_stays(published: Path, tmp_path: Path, edit_json):
    source = Path(shutil.copytree(published / "huggingface", tmp_path / "source"))
    with edit_json(source / "config.json") as values:
        values["text_config"]["sliding_window"] = 5
    convert(source, tmp_path / "store")
    convert(tmp_path / "store", tmp_path / "hf", format="huggingface")
    assert open_checkpoint(tmp_path / "hf").origin["sliding_window"] == 5
    assert open_checkpoint(tmp_path / "hf").config == open_checkpoint(source).config


@pytest.mark.parametrize("variant", ["pg1", "pg2", "pg2_28b"])
def test_big_visions_own_arrays(variant: str, golden: Path, tmp_path: Path):
    """Read as big_vision reads: numpy.load, names and shapes, bfloat16 as 2-byte void."""
    expected = np.load(next(golden.glob(f"big_vision/{variant}.params.npz")))
    found = {name.removeprefix("params/"): expected[name] for name in expected.files}
    source = golden / f"big_vision/{variant}.params.npz"
    for dtype, raw in (("float32", "<f4"), ("bfloat16", "|V2"), ("float16", "<f2")):
        target = tmp_path / f"{dtype}.npz"
        convert(source, target, format="big_vision", dtype=dtype)
        with np.load(target) as file:
            assert set(file.files) == {f"params/{name}" for name in found}
            for name, array in found.items():
                stored = file[f"params/{name}"]
                assert stored.shape == array.shape and stored.dtype == np.dtype(raw)
                if dtype == "float32":
                    np.testing.assert_array_equal(stored, array.astype(np.float32))


@pytest.mark.parametrize("name", ["huggingface", "big_vision"])
def test_a_changed_byte_is_found_later(name: str, written, tmp_path: Path, flip):
    copy = Path(shutil.copytree(written[name], tmp_path / "copy"))
    largest = max(copy.iterdir(), key=lambda path: path.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"sha256 differs|is damaged at"):
        check(copy)


def test_published_directories_have_no_digests(published: Path):
    with pytest.raises(CheckpointError, match="carries no checksums.*SHA256SUMS"):
        check(published / "huggingface")


def test_what_verify_finds_is_not_left_behind(
    pg2: PaliGemmaConfig, tokenizer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from paligemma_jax.weights import big_vision as npz_writer

    plain = npz_writer.as_bytes

    def faulty(array: np.ndarray) -> memoryview:
        array.reshape(-1)[:1] = 0
        return plain(array)

    weights = ArrayWeights(pg2, draw(pg2, "float32"))
    monkeypatch.setattr(npz_writer, "as_bytes", faulty)
    with pytest.raises(CheckpointError, match=r"values      llm/embedder.* 1 of 25,600 differ"):
        export_weights(tmp_path / "a.npz", weights, contents(None), "big_vision", verify=True)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(
    pg1: PaliGemmaConfig, tokenizer: bytes, tmp_path: Path, published: Path
):
    def export(format: str, name: str, config: PaliGemmaConfig = pg1, words: Any = tokenizer):
        weights = ArrayWeights(config, draw(config, "float32"))
        export_weights(tmp_path / name, weights, contents(words), format)

    capped = dataclasses.replace(pg1, llm=dataclasses.replace(pg1.llm, attn_logit_softcap=50.0))
    for (format, name, *rest), words in {
        (
            "safetensors",
            "a",
        ): "Unknown format 'safetensors': expected orbax, huggingface, big_vision",
        ("orbax", "a.npz"): "is the name of a file, and orbax is a directory",
        ("huggingface", "a", capped): "cannot compute attn_logit_softcap=50.0",
        ("huggingface", "a", pg1, None): "no tokenizer to write into",
    }.items():
        with pytest.raises((ConfigError, CheckpointError), match=re.escape(words)):
            export(format, name, *rest)
    source = published / "model.npz"
    with pytest.raises(CheckpointError, match="cannot hold.*--dtype bfloat16"):
        huge = ArrayWeights(pg1, {n: a * 1e6 for n, a in draw(pg1, "float32").items()})
        export_weights(tmp_path / "h", huge, contents(tokenizer), dtype="float16")
    (tmp_path / "there.npz").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path / "there.npz", format="big_vision")
    assert [path.name for path in tmp_path.iterdir()] == ["there.npz"]
    assert (tmp_path / "there.npz").read_text() == "mine"


def test_progress_tells_of_every_piece(published: Path, tmp_path: Path):
    seen: list[tuple[str, int, int]] = []
    watch = lambda *step: seen.append(step)  # noqa: E731
    convert(published / "model.npz", tmp_path / "t.npz", format="big_vision", progress=watch)
    done = [step[1] for step in seen]
    assert done == sorted(done) and done[0] == 0
    assert seen[-1] == ("", seen[0][2], seen[0][2])
    assert big_vision_name("img/pos_embed") == "img/pos_embedding"


def test_arrays_on_several_devices(pg2: PaliGemmaConfig):
    """As training leaves them: read a layer, or some rows, at a time."""
    arrays = draw(pg2, "float32")
    mesh = jax.make_mesh((2,), ("devices",))
    rows = jax.NamedSharding(mesh, jax.P("devices"))
    every = jax.NamedSharding(mesh, jax.P())
    for name in ("llm/embedder/input_embedding", "llm/layers/mlp/linear/w", "img/pos_embed"):
        array = arrays[name]
        placed = jax.device_put(array, rows if len(array) % 2 == 0 else every)
        weights = ArrayWeights(pg2, {name: placed})
        np.testing.assert_array_equal(weights.read(name, array.dtype), array)
