"""The attention mask of a prompt, printed, drawn and as JSON."""

import json
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paligemma_jax as pg
from tests.cli.conftest import Run

PROMPT = ["attention-mask", "--prompt", "detect red circle"]


def test_text_is_the_view_s(
    run: Run, store: Path, pipeline: pg.Pipeline, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "77")
    # No weights are read.
    monkeypatch.setattr("paligemma_jax.weights.checkpoint.Checkpoint.read_chunk", None)
    command = [*PROMPT, "--answer", "a star", "--model", store, "--images", 2, "--length", 20]
    outcome = run(*command)
    view = pg.attention_mask(
        pipeline.config, pipeline.processor, "detect red circle", "a star", images=2, length=20
    )
    assert outcome.code == 0 and outcome.out == f"{view.to_text(77)}\n"
    assert "img2×4" in outcome.out and "padding" in outcome.out
    monkeypatch.setattr("paligemma_jax.cli.attention_mask.encodes_unicode", lambda: False)
    plain = run(*command).out
    assert plain.isascii() and "##" in plain and "img2x4" in plain


def test_images_and_svg(run: Run, store: Path, tmp_path: Path):
    for name in ("mask.svg", "mask.png"):
        outcome = run(*PROMPT, "--model", store, "--out", tmp_path / name)
        assert outcome.code == 0 and outcome.out == ""
        again = run(*PROMPT, "--model", store, "--out", tmp_path / name)
        assert again.code == 1 and "--force" in again.err
    svg = xml.dom.minidom.parse(str(tmp_path / "mask.svg"))
    assert svg.documentElement is not None and svg.documentElement.tagName == "svg"
    assert Image.open(tmp_path / "mask.png").mode == "RGB"


def test_json_says_what_each_token_attends_to(run: Run, store: Path, tmp_path: Path):
    command = [*PROMPT, "--answer", "a", "--model", store, "--sliding-window", 3, "--json"]
    document = json.loads(run(*command, "--out", tmp_path / "a.png").out)
    kinds = [token["kind"] for token in document["tokens"]]
    assert kinds[:4] == ["image"] * 4 and kinds[-1] == "answer"
    assert document["tokens"][0] == {"kind": "image", "label": "img1", "image": 1}
    assert document["out"] == str(tmp_path / "a.png") and document["answer"] == "a"
    even, odd = document["masks"]
    assert "Even" in even["layers"] and "Odd" in odd["layers"]
    prefix = len(kinds) - kinds.count("answer")
    assert odd["attends_to"][0] == [[0, prefix]] and odd["attends_to"][-1] == [[0, len(kinds)]]
    assert even["attends_to"][-1] == [[len(kinds) - 3, len(kinds)]]
    assert np.array(odd["attends_to"]).shape == (len(kinds), 1, 2)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--length", 3], "3"),
        (["--images", 1000, "--resolution", 64], "16,384"),
        (["--resolution", 17], "multiple"),
        (["--out", "mask.txt"], ".svg"),
        (["--model", "demmo"], "Did you mean demo"),
        (["--model", Path(__file__).parents[1] / "golden/huggingface/pg1/hub_old"], "--tokenizer"),
    ],
)
def test_what_cannot_be_shown(run: Run, store: Path, options: list, word: str):
    assert "img×16" in run(*PROMPT, "--model", store, "--resolution", 16).out
    outcome = run(*PROMPT, "--model", store, *options)
    assert outcome.code == 1 and word in outcome.err and outcome.out == ""
