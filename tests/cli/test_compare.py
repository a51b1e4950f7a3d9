"""classify and score: lines best first, documents, and what cannot be compared."""

import inspect
import json
import math
from pathlib import Path

import pytest

import paligemma_jax as pg
from paligemma_jax.cli import text_commands as compare
from tests.cli.conftest import Run

LABELS = ["red circle", "star", "blue square"]


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch, pipeline: pg.Pipeline) -> None:
    monkeypatch.setattr("paligemma_jax.cli.output.load_pipeline", lambda args: pipeline)


def numbers(out: str) -> list[float]:
    return [float(line.split(" ")[0]) for line in out.splitlines()]


def test_classify_prints_every_label_of_one_picture(run: Run, pipeline: pg.Pipeline, picture: Path):
    outcome = run("classify", picture, " ; ".join(LABELS) + ";")
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{pipeline.classify(picture, LABELS)}\n"
    assert numbers(outcome.out) == sorted(numbers(outcome.out), reverse=True)


def test_classify_prints_the_best_of_several(run: Run, pipeline: pg.Pipeline, picture: Path):
    command = ["classify", picture, picture, " ; ".join(LABELS)]
    best = str(pipeline.classify(picture, LABELS)).splitlines()
    assert run(*command).out == f"{picture}: {best[0]}\n" * 2
    lines = run(*command, "--top", 2).out.splitlines()
    assert lines == [f"{picture}: {line}" for line in best[:2]] * 2


def test_classify_documents(run: Run, pipeline: pg.Pipeline, picture: Path):
    arguments = ["--question", "quoi ?", "--language", "fr", "--batch-size", 1, "--json"]
    lines = run("classify", picture, picture, "star ; circle", *arguments).out.splitlines()
    found = pipeline.classify(picture, ["star", "circle"], "quoi ?", "fr")
    for document in map(json.loads, lines):
        assert document["file"] == str(picture) and document["prompt"] == "answer fr quoi ?"
        assert document["label"] == found.best
        assert [row["label"] for row in document["labels"]] == [name for name, _ in found.ranked()]
        assert math.fsum(row["probability"] for row in document["labels"]) == pytest.approx(1)
        assert document["coverage"] == pytest.approx(found.coverage, rel=1e-4)


def test_default_question_is_the_library_s():
    assert inspect.signature(pg.Pipeline.classify).parameters["question"].default == (
        compare.QUESTION
    )


@pytest.mark.parametrize(("labels", "words"), [(";", "empty list"), ("cat ; cat", "comes twice")])
def test_labels_that_cannot_be_compared(run: Run, picture: Path, labels: str, words: str):
    outcome = run("classify", picture, labels)
    assert outcome.code == 1 and words in outcome.err and outcome.out == ""


def test_score_prints_the_likeliest_first(run: Run, pipeline: pg.Pipeline, picture: Path):
    answers = ["yes", "", "a\nb", "yes"]
    outcome = run("score", picture, "answer en why?", "--candidates", *answers)
    scored = pipeline.score(picture, "answer en why?", answers)
    ranked = sorted(scored, key=lambda answer: -answer.logprob)
    shown = {"": "(empty)", "a\nb": "a\\nb"}
    expected = [f"{a.logprob:.3f} {shown.get(a.text, a.text)}" for a in ranked]
    assert outcome.out.splitlines() == expected


def test_score_documents(run: Run, pipeline: pg.Pipeline, picture: Path, tmp_path: Path):
    command = ["score", picture, tmp_path / "none.png", "ocr", "--candidates", "A", "B C", "--json"]
    outcome = run(*command)
    good, bad = map(json.loads, outcome.out.splitlines())
    assert outcome.code == 1 and "none.png" in bad["error"]
    assert good["file"] == str(picture) and good["prompt"] == "ocr"
    for row, scored in zip(
        sorted(good["candidates"], key=lambda row: row["text"]),
        pipeline.score(picture, "ocr", ["A", "B C"]),
        strict=True,
    ):
        assert row["text"] == scored.text and row["tokens"] == list(scored.tokens)
        assert row["logprob"] == pytest.approx(math.fsum(row["logprobs"]))
        assert row["logprobs"] == pytest.approx(scored.logprobs, abs=1e-4)


def test_score_together_is_one_prompt(run: Run, pipeline: pg.Pipeline, picture: Path):
    command = ["score", picture, picture, "ocr", "--together", "--candidates", "A", "B"]
    lines = run(*command).out.splitlines()
    scored = {a.text: a.logprob for a in pipeline.score([picture, picture], "ocr", ["A", "B"])}
    assert sorted(lines) == sorted(f"{value:.3f} {text}" for text, value in scored.items())
    document = json.loads(run(*command, "--json").out)
    assert document["files"] == [str(picture)] * 2 and len(document["candidates"]) == 2


def test_score_without_a_prompt_or_candidates(run: Run, picture: Path):
    assert run("score", picture, "ocr").code == 2
    assert run("score", picture, "ocr", "--candidates").code == 2
    outcome = run("score", "ocr", picture, "--candidates", "A")
    assert outcome.code == 2 and "pictures come first" in outcome.err


def test_a_candidate_that_is_too_long(run: Run, picture: Path):
    outcome = run("score", picture, "ocr", "--candidates", "why " * 600)
    assert outcome.code == 1 and "Candidate 0" in outcome.err
