"""Checkpoints of random weights: equal from equal arguments, complete, and nowhere zero."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.benchmark.random_checkpoint import RandomTensors, write_checkpoint
from paligemma_jax.benchmark.subjects import TINY
from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.huggingface import EMBEDDING

GEMMA2 = dataclasses.replace(
    TINY,
    llm=dataclasses.replace(
        TINY.llm, num_kv_heads=2, post_norms=True, attn_logit_softcap=50.0, final_logit_softcap=20.0
    ),
)


def arrays(config: PaliGemmaConfig, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    tensors = RandomTensors(config, seed=seed, dtype=dtype)
    return {key: tensors.whole(key).astype(np.float32) for key in tensors.entries}


@pytest.mark.parametrize("config", [TINY, GEMMA2])
def test_loads_as_it_was_asked_for(config: PaliGemmaConfig, tmp_path: Path):
    folder = write_checkpoint(tmp_path / "weights", config)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == config


@pytest.mark.parametrize("config", [TINY, GEMMA2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_weight_is_zero_or_huge(config: PaliGemmaConfig, dtype: str):
    for array in arrays(config, dtype).values():
        assert np.all(np.isfinite(array)) and np.all(array != 0)
        assert np.abs(array).max() < 100


def test_seeds_and_dtypes():
    exact, other = arrays(TINY, "float32"), arrays(TINY, "float32", seed=4)
    rounded = arrays(TINY, "bfloat16")
    for key, array in arrays(TINY, "float32").items():
        np.testing.assert_array_equal(array, exact[key])
        assert np.mean(array == other[key]) < 0.1
        np.testing.assert_allclose(rounded[key], array, rtol=2**-8)


def test_no_two_tokens_have_the_same_embedding():
    table = RandomTensors(TINY, seed=0, dtype="bfloat16").whole(EMBEDDING)
    assert len(np.unique(table.view(np.uint16), axis=0)) == TINY.llm.vocab_size + 64


def test_eos_and_padding_are_never_generated():
    table = RandomTensors(TINY, seed=0, dtype="float32").whole(EMBEDDING)
    length = np.linalg.norm(table, axis=1)
    ordinary = np.delete(length[: TINY.llm.vocab_size], 1)
    assert max(length[1], length[TINY.llm.vocab_size :].max()) < ordinary.min() / 50


def test_what_is_there_is_taken_as_it_is(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "weights", TINY)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert write_checkpoint(folder, TINY) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(CheckpointError, match="got others"):
        write_checkpoint(folder, TINY, seed=1)


def test_foreign_directory_is_left_alone(tmp_path: Path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match="--weights DIR"):
        write_checkpoint(tmp_path, TINY)
    assert (tmp_path / "mine").read_text() == "precious"


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(RandomTensors, "blocks", fail)
    with pytest.raises(RuntimeError):
        write_checkpoint(tmp_path / "weights", TINY)
    assert not list(tmp_path.iterdir())


def test_paligemma_2_has_its_published_cap(tmp_path: Path):
    llm = dataclasses.replace(GEMMA2.llm, final_logit_softcap=0.0)
    folder = write_checkpoint(tmp_path / "weights", dataclasses.replace(GEMMA2, llm=llm))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.llm.final_logit_softcap == 30.0


@pytest.mark.parametrize(
    ("asked", "size", "written"), [(None, 56, 4096), (None, 896, 8192), (6, 56, 6)]
)
def test_window(asked: int | None, size: int, written: int, tmp_path: Path):
    img = dataclasses.replace(TINY.img, image_size=size)
    llm = dataclasses.replace(GEMMA2.llm, sliding_window=asked)
    config = dataclasses.replace(TINY, img=img, llm=llm)
    folder = write_checkpoint(tmp_path / "weights", config)
    values = json.loads((folder / "config.json").read_text())
    assert values["text_config"]["sliding_window"] == written
