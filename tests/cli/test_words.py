"""caption, answer, ocr, count and generate: prompts sent, lines and documents printed."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run


@pytest.mark.parametrize(
    ("argv", "prompt"),
    [
        (["caption", "P"], "caption en"),
        (["caption", "P", "--language", "de"], "caption de"),
        (["ocr", "P"], "ocr"),
        (["answer", "P", "what is it?"], "answer en what is it?"),
        (["answer", "--language", "fr", "P", "quoi ?"], "answer fr quoi ?"),
        (["answer", "P", "--json", "what is it?"], "answer en what is it?"),
        (["count", "P", "red cars"], "answer en how many red cars are there?"),
        (["generate", "P", "caption en"], "caption en"),
        (["detect", "P", "cat ; red dog;"], "detect cat ; red dog"),
    ],
)
def test_prompt(run: Run, says, picture: Path, argv: list[str], prompt: str):
    calls = says("3")
    assert run(*[picture if a == "P" else a for a in argv]).code == 0
    assert calls == [[prompt]]


def test_one_picture_prints_the_answer_alone(run: Run, says, picture: Path):
    says("a red circle")
    assert run("caption", picture).out == "a red circle\n"


def test_several_pictures_print_their_names(run: Run, says, picture: Path):
    calls = says("one", "two\nlines", "three")
    outcome = run("ocr", picture, picture, picture, "--batch-size", 2)
    assert outcome.out == f"{picture}: one\n{picture}: two\n{picture}: lines\n{picture}: three\n"
    assert [len(prompts) for prompts in calls] == [2, 1]


def test_json_has_a_line_for_each_picture(run: Run, says, picture: Path):
    says("ein Café", "zwei")
    lines = run("caption", picture, picture, "--json").out.splitlines()
    assert json.loads(lines[0]) == {
        "file": str(picture),
        "prompt": "caption en",
        "answer": "ein Café",
        "tokens": [5, 1],
        "logprob": -0.75,
    }
    assert json.loads(lines[1])["answer"] == "zwei"


def test_together_is_one_prompt_about_all(run: Run, says, picture: Path):
    calls = says("yes")
    outcome = run("answer", picture, picture, "the same?", "--together", "--json")
    document = json.loads(outcome.out)
    assert document["files"] == [str(picture)] * 2 and document["answer"] == "yes"
    assert calls == [["answer en the same?"]]


def test_count_prints_a_number(run: Run, says, picture: Path):
    says("Three.", "12")
    assert run("count", picture, picture, "cats").out == f"{picture}: 3\n{picture}: 12\n"


def test_count_says_when_the_answer_is_no_number(run: Run, says, picture: Path):
    says("many", "4")
    outcome = run("count", picture, picture, "cats", "--json")
    first, second = map(json.loads, outcome.out.splitlines())
    assert outcome.code == 1
    assert first["answer"] == "many" and "number would fit" in first["error"]
    assert second["count"] == 4
    assert "'many'" in outcome.err and "Traceback" not in outcome.err


def test_unreadable_pictures_do_not_stop_the_others(run: Run, says, picture: Path, tmp_path: Path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])
    says("one", "two")
    outcome = run(
        "caption",
        tmp_path / "none.png",
        picture,
        tmp_path / "text.png",
        tmp_path / "cut.png",
        picture,
    )
    assert outcome.code == 1
    assert outcome.out == f"{picture}: one\n{picture}: two\n"
    messages = outcome.err.splitlines()
    assert [message[:17] for message in messages] == ["paligemma: error:"] * 3
    for message, words in zip(
        messages, ("does not exist", "it is text", "damaged or cut short"), strict=True
    ):
        assert words in message


def test_no_model_is_loaded_without_a_picture(run: Run, tmp_path: Path):
    outcome = run("caption", tmp_path / "none.png", "--model", tmp_path / "no-model")
    assert outcome.code == 1 and "none.png" in outcome.err and "no-model" not in outcome.err


def test_random_model_answers_the_same_twice(run: Run, store: Path, picture: Path):
    """The whole way, with sampling: a seed fixes the draws, whatever else is in the batch."""
    command = ["generate", "caption en", "--model", store, "--max-new-tokens", 6, "--json"]
    command += ["--temperature", 1.5, "--dtype", "float32"]
    first, second = (
        [json.loads(line) for line in run(*command[:1], picture, picture, *command[1:], *seed)
         .out.splitlines()]
        for seed in (["--seed", 3], ["--seed", 4])
    )  # fmt: skip
    assert first[1]["tokens"] == second[0]["tokens"] != first[0]["tokens"]
    assert len(first[0]["tokens"]) <= 6 and first[0]["logprob"] < 0


def test_other_resolution_and_dtype(run: Run, store: Path, picture: Path):
    outcome = run("ocr", picture, "--model", store, "--resolution", 16, "--max-new-tokens", 2)
    assert outcome.code == 0, outcome.err
