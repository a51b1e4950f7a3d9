"""Options for how answers are chosen: what they ask the pipeline for, and what is printed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import paligemma_jax as pg
from tests.cli.conftest import Run, Says

PROMPT, LIMIT = "caption en", 6


@pytest.fixture
def options(store: Path) -> list[object]:
    return ["--model", store, "--dtype", "float32", "--max-new-tokens", LIMIT]


def documents(run: Run, *argv: object) -> list[dict[str, Any]]:
    outcome = run(*argv, "--json")
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--top-k", "0"], "whole number"),
        (["--top-p", "1.5"], "from 0 to 1"),
        (["--min-p", "x"], "from 0 to 1"),
        (["--alpha", "inf", "--beams", "2"], "no exponent"),
        (["--stop", ""], "empty text"),
        (["--best-of", "0"], "whole number"),
        (["--beams", "1000"], "whole number"),
        (["--temperature", "0", "--top-p", "0.9"], "--top-p draws"),
        (["--temperature", "0", "--best-of", "2"], "--best-of draws"),
        (["--beams", "2", "--top-k", "3"], "--beams does not go with --top-k"),
        (["--beams", "2", "--min-p", "0"], "--beams does not go with --min-p"),
        (["--beams", "2", "--temperature", "1"], "--beams does not go with --temperature"),
        (["--beams", "2", "--best-of", "2"], "--beams does not go with --best-of"),
        (["--beams", "2", "--stop", "a"], "--beams does not go with --stop"),
        (["--beams", "2", "--stream"], "--beams does not go with --stream"),
        (["--beams", "2", "--logprobs"], "--logprobs does not go with --beams"),
        (["--stream", "--json"], "--stream does not go with --json"),
        (["--stream", "--best-of", "2"], "--stream does not go with --best-of"),
        (["--alpha", "1"], "--alpha ranks several answers"),
        (["--min-new-tokens", "9", "--max-new-tokens", "8"], "is more than"),
    ],
)
def test_contradictions_are_wrong_usage(run: Run, picture: Path, argv: list[str], words: str):
    for command in (["caption", picture], ["text", "ocr"]):
        outcome = run(*command, *argv)
        assert outcome.code == 2 and outcome.out == "" and words in outcome.err


def test_samplers_are_chained_in_order(
    run: Run, options: list[object], picture: Path, pipeline: pg.Pipeline
):
    draws = ["--temperature", 3, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.001, "--seed", 7]
    said = documents(run, "generate", picture, picture, PROMPT, *draws, *options)
    steps = [pg.Temperature(temperature=3.0), pg.TopK(k=50), pg.TopP(p=0.9), pg.MinP(p=0.001)]
    rows = pipeline.generate(
        [picture] * 2, [PROMPT] * 2, sampler=pg.Chain(steps), seed=7, max_new_tokens=LIMIT
    )
    assert [document["tokens"] for document in said] == [list(row.tokens) for row in rows]


def test_an_unreadable_picture_changes_no_draw(
    run: Run, options: list[object], picture: Path, tmp_path: Path
):
    draw = ["--temperature", 3, "--json", *options]
    pictures = [picture, tmp_path / "none.png", picture]
    lines = run("caption", *pictures, *draw).out.splitlines()
    alone = run("caption", picture, *draw, "--seed", 2).out
    assert json.loads(lines[2])["tokens"] == json.loads(alone)["tokens"]


def test_best_of_several(run: Run, options: list[object], picture: Path, pipeline: pg.Pipeline):
    choice = ["--best-of", 3, "--alpha", 1, "--top-k", 40]
    said = documents(run, "caption", picture, *choice, *options)[0]
    rows = pipeline.best_of(
        [picture], [PROMPT], n=3, length_penalty=1.0, top_k=40, max_new_tokens=LIMIT
    )
    assert [answer["tokens"] for answer in said["answers"]] == [list(a.tokens) for a in rows[0]]
    assert said["tokens"] == said["answers"][0]["tokens"]
    assert said["score"] == pytest.approx(rows[0][0].logprob / len(rows[0][0].tokens))
    assert run("caption", picture, *choice, *options).out == f"{rows[0][0].text}\n"


def test_beams(run: Run, options: list[object], picture: Path, pipeline: pg.Pipeline):
    said = documents(run, "caption", picture, "--beams", 3, *options)[0]
    row = pipeline.beam_search(
        [picture], [PROMPT], num_beams=3, num_return_sequences=3, max_new_tokens=LIMIT
    )[0]
    assert [answer["tokens"] for answer in said["answers"]] == [list(a.tokens) for a in row]
    assert said["answer"] == row[0].text and said["score"] == pytest.approx(said["logprob"])
    assert run("caption", picture, "--beams", 3, *options).out == f"{row[0].text}\n"


def test_begun_stopped_and_with_log_probabilities(
    run: Run, options: list[object], picture: Path, pipeline: pg.Pipeline
):
    plain = pipeline.generate([picture], [PROMPT], answer_prefixes=["red"], max_new_tokens=LIMIT)[0]
    stop = plain.text[len(plain.text) // 2 :]
    choice = ["--begin", "red", "--stop", "never said", "--stop", stop, *options]
    said = documents(run, "caption", picture, "--logprobs", *choice)[0]
    assert said["begin"] == "red" and said["stop"] == stop
    assert said["answer"] == plain.text.partition(stop)[0]
    assert sum(said["logprobs"]) == pytest.approx(said["logprob"])
    lines = run("caption", picture, "--logprobs", *choice).out.splitlines()
    assert len(lines) >= 1 + len(said["tokens"])
    assert lines[-1].startswith(f"{said['logprobs'][-1]:.4f} ")


def test_at_least_so_many_tokens(run: Run, options: list[object], picture: Path):
    said = documents(run, "ocr", picture, "--min-new-tokens", 5, *options)[0]
    assert len(said["tokens"]) >= 5


def test_streams_of_several_pictures(
    run: Run, options: list[object], picture: Path, pipeline: pg.Pipeline, tmp_path: Path
):
    rows = pipeline.generate([picture] * 2, [PROMPT] * 2, max_new_tokens=LIMIT)
    outcome = run("caption", picture, tmp_path / "none.png", picture, "--stream", *options)
    lines = [f"{picture}: {line}" for row in rows for line in row.text.split("\n")]
    assert outcome.code == 1 and "none.png" in outcome.err
    assert outcome.out == "".join(f"{line}\n" for line in lines)
    question = ["answer", picture, picture, "why?", "--together", *options]
    assert run(*question, "--stream").out == run(*question).out


def test_text_needs_no_picture(run: Run, options: list[object], pipeline: pg.Pipeline):
    prompts = ["caption en", "ocr"]
    rows = pipeline.generate(None, prompts, max_new_tokens=LIMIT)
    said = documents(run, "text", *prompts, *options)
    for document, prompt, row in zip(said, prompts, rows, strict=True):
        assert document.pop("logprob") == pytest.approx(row.logprob, abs=1e-4)
        assert document == {"prompt": prompt, "answer": row.text, "tokens": list(row.tokens)}
    assert run("text", "ocr", "--stream", *options).out == f"{rows[1].text}\n"
    lines = run("text", *prompts, *options).out
    assert lines == run("text", *prompts, "--stream", *options).out


def test_text_is_not_for_pictures(run: Run, says: Says, picture: Path):
    outcome = run("text", picture)
    assert outcome.code == 2 and "paligemma generate" in outcome.err


def test_a_stream_comes_piece_by_piece(picture: Path):
    """In a process of its own: what it prints can be read before it ends."""
    command = [sys.executable, "-u", "-m", "paligemma_jax", "generate", str(picture), "caption en"]
    choice = ["--stream", "--min-new-tokens", "300", "--max-new-tokens", "512"]
    with subprocess.Popen([*command, *choice], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        first = process.stdout.read(1)
        assert first and process.poll() is None
        process.terminate()
