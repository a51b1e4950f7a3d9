"""convert and info: what they say and write, and one clear error for what is no checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.cli.checkpoint_commands import decoder_name, encoder_name
from paligemma_jax.cli.output import data_size
from paligemma_jax.config import VARIANTS
from tests.cli.conftest import Run

GOLDEN = Path(__file__).parents[1] / "golden"
GEMMA_TOKENIZER = GOLDEN / "processing" / "tiny_gemma.model"


def test_convert_says_what_it_wrote(run: Run, store: Path, tmp_path: Path):
    outcome = run("convert", store, tmp_path / "new", "--progress")
    assert outcome.code == 0, outcome.err
    assert (
        "parameters in float32" in outcome.out
        and "preprocessing, tokenizer and mask codec" in outcome.out
    )
    assert "converting" in outcome.err
    assert run("info", tmp_path / "new", "--check").code == 0


def test_convert_to_every_format(run: Run, store: Path, tmp_path: Path):
    for name, options in {
        "hf": ["--to", "huggingface", "--verify", "--resolution", "16"],
        "model.npz": ["--to", "big_vision", "--dtype", "bfloat16", "--verify"],
    }.items():
        outcome = run("convert", store, tmp_path / name, *options)
        assert outcome.code == 0, outcome.err
        assert "every tensor is as in" in outcome.out
        assert ("bfloat16" in outcome.out) == ("tokenizer" not in outcome.out) == ("." in name)
        assert run("info", tmp_path / name, "--check").code == 0
    outcome = run("convert", store, tmp_path / "store.npz")
    assert outcome.code == 1 and "--to big_vision" in outcome.err


def test_info_of_a_directory(run: Run, store: Path):
    outcome = run("info", store)
    for words in ("written by paligemma-jax", "in float32", "present", "8 x 8 pixels", "bilinear"):
        assert words in outcome.out
    document = json.loads(run("info", store, "--json").out)
    assert document["checkpoint"]["kind"] == "store" and document["checkpoint"]["tokenizer"]
    assert document["parameters"]["total"] * 4 == document["checkpoint"]["stored_bytes"]
    assert document["weight_bytes"]["int4"] * 8 == document["checkpoint"]["stored_bytes"]


def test_a_mask_codec_goes_along(
    run: Run, store: Path, pipeline: pg.Pipeline, picture: Path, tmp_path: Path
):
    bare, full = tmp_path / "bare", tmp_path / "full"
    dataclasses.replace(pipeline, mask_codec=None).save(bare)
    assert "missing; segment takes it as --mask-codec" in run("info", bare).out
    outcome = run("convert", bare, full, "--mask-codec", picture)
    assert outcome.code == 1 and not full.exists()
    outcome = run("convert", bare, tmp_path / "copy")
    assert outcome.code == 0 and "mask codec" not in outcome.out
    outcome = run("convert", bare, full, "--mask-codec", store / "mask_codec.npz")
    assert outcome.code == 0 and "mask codec" in outcome.out
    assert json.loads(run("info", full, "--json").out)["checkpoint"]["mask_codec"] is True
    assert json.loads(run("info", bare, "--json").out)["checkpoint"]["mask_codec"] is False
    assert (full / "mask_codec.npz").read_bytes() == (store / "mask_codec.npz").read_bytes()


def test_check_finds_a_flipped_bit(run: Run, store: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    largest = max((copy / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    outcome = run("info", copy, "--check")
    assert outcome.code == 1 and "damaged" in outcome.err and outcome.out == ""


def test_info_of_a_published_name(run: Run):
    outcome = run("info", "google/paligemma2-3b-mix-448")
    for words in ("SigLIP So400m/14", "Gemma 2 2B", "3,032,979,696", "512 tokens", "1,024 image",
                  "6.07 GB", "106.5 MB", "paligemma download paligemma2-3b-mix-448"):  # fmt: skip
        assert words in outcome.out
    document = json.loads(run("info", "paligemma-3b-pt-224", "--json").out)
    assert document["parameters"]["total"] == 2_923_335_408
    assert document["kv_cache_bytes_per_token"]["bfloat16"] == 2 * 18 * 256 * 2
    assert "checkpoint" not in document


def test_every_published_model_is_listed_and_named(run: Run):
    rows = json.loads(run("info", "--list", "--json").out)
    assert [row["name"] for row in rows] == list(VARIANTS)
    lines = run("info", "--list").out.splitlines()
    assert len(lines) == len(VARIANTS) + 1
    for config in VARIANTS.values():
        assert encoder_name(config.img) == "SigLIP So400m/14"
        assert "own size" not in decoder_name(config.llm)


@pytest.mark.parametrize(
    ("name", "near"),
    [("paligemma2-3b-mix-484", "paligemma2-3b-mix-448"), ("demmo", "demo")],
)
def test_unknown_names_suggest_near_ones(run: Run, picture: Path, name: str, near: str):
    for command in (["info", name], ["caption", picture, "--model", name]):
        outcome = run(*command)
        assert outcome.code == 1 and f"Did you mean {near}" in outcome.err


def test_published_name_without_files_says_how_to_get_them(
    run: Run, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for command in (
        ["caption", picture, "--model", "paligemma-3b-mix-224"],
        ["info", "paligemma-3b-mix-224", "--check"],
    ):
        outcome = run(*command)
        assert outcome.code == 1 and "paligemma download" in outcome.err


def _wrong_path(path: Path) -> None:
    del path


def _text_file(path: Path) -> None:
    path.write_text("no checkpoint")


def _empty_directory(path: Path) -> None:
    path.mkdir()


def _pickled_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, weights=np.array([{"a": 1}], object))


def _truncated_safetensors(path: Path) -> None:
    shutil.copytree(GOLDEN / "huggingface" / "pg1" / "hub_old", path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _config_without_sizes(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_wrong_path, "neither a file, nor a directory"),
        (_text_file, "source"),
        (_empty_directory, "is empty"),
        (_pickled_npz, "pickle"),
        (_truncated_safetensors, "model.safetensors"),
        (_config_without_sizes, "config.json"),
    ],
)
def test_bad_checkpoints_are_one_clear_error(
    run: Run, picture: Path, tmp_path: Path, make, words: str
):
    source = tmp_path / "source"
    make(source)
    before = sorted(tmp_path.rglob("*"))
    for command in (
        ["convert", source, tmp_path / "target"],
        ["info", source],
        ["caption", picture, "--model", source],
    ):
        outcome = run(*command)
        assert outcome.code == 1, outcome
        assert outcome.out == "" and outcome.err.startswith("paligemma: error: ")
        assert words in outcome.err and "Traceback" not in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_tokenizer_of_another_model_is_refused(run: Run, store: Path, tmp_path: Path):
    outcome = run("convert", store, tmp_path / "new", "--tokenizer", GEMMA_TOKENIZER)
    assert outcome.code == 1 and "pieces" in outcome.err
    assert not list(tmp_path.iterdir())


def test_an_existing_target_stays(run: Run, store: Path, tmp_path: Path):
    (tmp_path / "new").mkdir()
    outcome = run("convert", store, tmp_path / "new")
    assert outcome.code == 1 and "exists already" in outcome.err
    assert not list((tmp_path / "new").iterdir())


def test_prompt_that_is_too_long(run: Run, store: Path, picture: Path):
    outcome = run("answer", picture, "why " * 600, "--model", store)
    assert outcome.code == 1 and "At most 512" in outcome.err


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (7_774_848, "7.775 MB"), (6.066e9, "6.07 GB")]
)
def test_sizes_in_words(count: float, words: str):
    assert data_size(count) == words
