from pathlib import Path

import pytest

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.checkpoint import describe, open_checkpoint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere does not exist. Expected a Hugging Face directory"),
        ("nowhere/model.npz", "does not exist"),
        ("", "is not a checkpoint: it is empty"),
        ("photo", "is not a checkpoint: it holds beach.jpg"),
        ("notes.txt", "is not an npz file; it begins with b'buy milk'"),
        ("x.safetensors", "is only a part of a checkpoint.*Pass the directory"),
        ("two", "holds 2 npz files: a.npz, b.npz"),
    ],
)
def test_paths_that_are_no_checkpoint(name: str, message: str, tmp_path: Path):
    if name:
        for directory, file in (("photo", "beach.jpg"), ("two", "a.npz"), ("two", "b.npz")):
            (tmp_path / directory).mkdir(exist_ok=True)
            (tmp_path / directory / file).touch()
        (tmp_path / "notes.txt").write_text("buy milk")
        (tmp_path / "x.safetensors").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_descriptions(published: Path, pg2: PaliGemmaConfig):
    info = describe(published / "huggingface")
    assert (info.kind, info.config) == ("huggingface", pg2)
    assert info.dtypes == {"bfloat16": info.parameters}
    assert info.nbytes == 2 * info.parameters
    assert info.has_tokenizer and info.processor["encoding"] == "huggingface"
    assert describe(published / "model.npz").kind == "big_vision"
    assert describe(published).kind == "big_vision"  # a directory with one npz


def test_home_directories_are_known(published: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(published))
    assert open_checkpoint("~/model.npz").kind == "big_vision"
