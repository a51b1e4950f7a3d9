"""The attention mask of a prompt, printed, drawn and as JSON."""

import json
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from tests.cli.conftest import Run

PROMPT = ["mask", "--prompt", "detect red circle"]


def test_text_is_the_view_s(
    run: Run, store: Path, pipeline: pg.Pipeline, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "77")
    outcome = run(*PROMPT, "--answer", "a star", "--model", store, "--images", 2, "--length", 20)
    view = pg.attention_mask(
        pipeline.config, pipeline.processor, "detect red circle", "a star", images=2, length=20
    )
    assert outcome.code == 0 and outcome.out == f"{view.to_text(77)}\n"
    assert "img2×4" in outcome.out and "padding" in outcome.out


def test_no_weights_are_read(run: Run, store: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("paligemma_jax.weights.checkpoint.Checkpoint.tensors", None)
    assert run(*PROMPT, "--model", store).code == 0


def test_terminals_without_blocks(run: Run, store: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("paligemma_jax.cli.demo.encodes_unicode", lambda: False)
    outcome = run(*PROMPT, "--answer", "x", "--model", store, "--length", 20)
    assert outcome.out.isascii() and "##" in outcome.out and "imgx4" in outcome.out


def test_pictures_and_svg(run: Run, store: Path, tmp_path: Path):
    for name in ("mask.svg", "mask.png"):
        outcome = run(*PROMPT, "--model", store, "--out", tmp_path / name)
        assert outcome.code == 0 and outcome.out == ""
        again = run(*PROMPT, "--model", store, "--out", tmp_path / name)
        assert again.code == 1 and "--force" in again.err
    svg = xml.dom.minidom.parse(str(tmp_path / "mask.svg"))
    assert svg.documentElement is not None and svg.documentElement.tagName == "svg"
    assert Image.open(tmp_path / "mask.png").mode == "RGB"


def test_json_says_what_each_token_sees(run: Run, store: Path, tmp_path: Path):
    command = [*PROMPT, "--answer", "a", "--model", store, "--sliding-window", 3, "--json"]
    document = json.loads(run(*command, "--out", tmp_path / "a.png").out)
    kinds = [token["kind"] for token in document["tokens"]]
    texts = len(kinds) - 4
    assert kinds[:4] == ["image"] * 4 and kinds[-1] == "answer"
    assert document["tokens"][0] == {"kind": "image", "label": "img1", "picture": 1}
    assert document["out"] == str(tmp_path / "a.png") and document["answer"] == "a"
    even, odd = document["masks"]
    assert "Even" in even["layers"] and "Odd" in odd["layers"]
    prefix = 4 + texts - kinds.count("answer")
    assert odd["sees"][0] == [[0, prefix]] and odd["sees"][-1] == [[0, len(kinds)]]
    assert even["sees"][-1] == [[len(kinds) - 3, len(kinds)]]
    assert np.array(odd["sees"]).shape == (len(kinds), 1, 2)


def test_resolution_changes_the_number_of_image_tokens(run: Run, store: Path):
    assert "img×16" in run(*PROMPT, "--model", store, "--resolution", 16).out
    outcome = run(*PROMPT, "--model", store, "--resolution", 17)
    assert outcome.code == 1 and "multiple" in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--length", 3], "At most 3"),
        (["--images", 1000, "--resolution", 64], "At most 16,384"),
        (["--out", "mask.txt"], ".svg"),
        (["--model", "demmo"], "Did you mean demo"),
    ],
)
def test_what_cannot_be_shown(run: Run, store: Path, options: list, words: str):
    outcome = run(*PROMPT, "--model", store, *options)
    assert outcome.code == 1 and words in outcome.err and outcome.out == ""


def test_a_checkpoint_without_a_tokenizer(run: Run):
    source = Path(__file__).parents[1] / "golden" / "huggingface" / "pg1" / "hub_old"
    outcome = run(*PROMPT, "--model", source)
    assert outcome.code == 1 and "--tokenizer" in outcome.err
