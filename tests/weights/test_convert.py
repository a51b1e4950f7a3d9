import dataclasses
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from paligemma_jax.errors import CheckpointError
from paligemma_jax.processing.processor import Processor
from paligemma_jax.weights.big_vision import big_vision_name
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.convert import convert


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
