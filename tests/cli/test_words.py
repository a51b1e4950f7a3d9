"""caption, answer, ocr, count and generate: prompts sent, lines and documents printed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import paligemma_jax as pg
from tests.cli.conftest import SURE, UNSURE, Run, Says
from tests.processing.test_video import write_video


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
        (["segment", "P", "cat ; red dog;"], "segment cat ; red dog"),
    ],
)
def test_prompt(run: Run, says: Says, picture: Path, argv: list[str], prompt: str):
    calls = says("3")
    assert run(*[picture if a == "P" else a for a in argv]).code == 0
    assert calls == [[prompt]]


def test_one_picture_prints_the_answer_alone(run: Run, says: Says, picture: Path):
    says("a red circle")
    assert run("caption", picture).out == "a red circle\n"


def test_several_pictures_print_their_names(run: Run, says: Says, picture: Path):
    calls = says("one", "two\nlines", "three")
    outcome = run("ocr", picture, picture, picture, "--batch-size", 2)
    assert outcome.out == f"{picture}: one\n{picture}: two\n{picture}: lines\n{picture}: three\n"
    assert [len(prompts) for prompts in calls] == [2, 1]


def test_json_has_a_line_for_each_picture(
    run: Run, says: Says, pipeline: pg.Pipeline, picture: Path
):
    says("ein Café", "zwei")
    tokens = [*pipeline.processor.tokenizer.encode("ein Café"), 1]
    lines = run("caption", picture, picture, "--json").out.splitlines()
    assert json.loads(lines[0]) == {
        "file": str(picture),
        "prompt": "caption en",
        "answer": "ein Café",
        "tokens": tokens,
        "logprob": pytest.approx(math.log(SURE) * (len(tokens) - 1) + math.log(UNSURE)),
    }
    assert json.loads(lines[1])["answer"] == "zwei"


def test_together_is_one_prompt_about_all(run: Run, says: Says, picture: Path):
    calls = says("yes")
    outcome = run("answer", picture, picture, "the same?", "--together", "--json")
    document = json.loads(outcome.out)
    assert document["files"] == [str(picture)] * 2 and document["answer"] == "yes"
    assert calls == [["answer en the same?"]]


def test_count_prints_a_number(run: Run, says: Says, picture: Path):
    says("Three.", "12")
    assert run("count", picture, picture, "cats").out == f"{picture}: 3\n{picture}: 12\n"


def test_count_says_when_the_answer_is_no_number(run: Run, says: Says, picture: Path):
    says("many", "4")
    outcome = run("count", picture, picture, "cats", "--json")
    first, second = map(json.loads, outcome.out.splitlines())
    assert outcome.code == 1
    assert first["answer"] == "many" and "number would fit" in first["error"]
    assert second["count"] == 4
    assert "'many'" in outcome.err and "Traceback" not in outcome.err


def test_unreadable_pictures_do_not_stop_the_others(
    run: Run, says: Says, picture: Path, tmp_path: Path
):
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
    again = run(*command[:1], picture, picture, *command[1:], "--seed", 3, "--batch-size", 1)
    answers = [json.loads(line)["tokens"] for line in again.out.splitlines()]
    assert answers == [document["tokens"] for document in first]


def test_other_resolution_and_dtype(run: Run, store: Path, picture: Path):
    outcome = run("ocr", picture, "--model", store, "--resolution", 16, "--max-new-tokens", 2)
    assert outcome.code == 0, outcome.err


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.MP4"
    path.write_bytes(write_video())
    return path


def test_a_video_is_frames_of_one_prompt(
    run: Run, store: Path, pipeline: pg.Pipeline, picture: Path, video: Path
):
    options = ["--model", store, "--dtype", "float32", "--max-new-tokens", 4, "--json"]
    frames = pg.read_frames(video, 3)
    question = ["answer", video, picture, "why?", "--frames", 3, *options]
    first, second = [json.loads(line)["tokens"] for line in run(*question).out.splitlines()]
    limits: dict[str, Any] = {"max_new_tokens": 4}
    prompts = ["answer en why?"] * 2
    alone = pipeline.generate([frames, picture], prompts, **limits)
    assert [first, second] == [list(answer.tokens) for answer in alone]
    document = json.loads(run(*question, "--together").out)
    together = pipeline.generate([[*frames, pg.load_image(picture)]], prompts[:1], **limits)
    assert document["files"] == [str(video), str(picture)]
    assert document["tokens"] == list(together[0].tokens)


@pytest.mark.parametrize("command", [["caption"], ["generate"], ["classify"], ["score"]])
def test_commands_that_take_videos(run: Run, store: Path, video: Path, command: list):
    words = {"generate": ["ocr"], "classify": ["a ; b"], "score": ["ocr", "--candidates", "A"]}
    outcome = run(*command, video, *words.get(command[0], []), "--model", store, "--frames", 2)
    assert outcome.code == 0, outcome.err


def test_commands_that_take_no_videos_say_which_do(run: Run, says: Says, video: Path):
    says()
    for command in (["ocr", video], ["detect", video, "cat"], ["segment", video, "cat"]):
        outcome = run(*command)
        assert outcome.code == 1 and "is a video" in outcome.err and "answer" in outcome.err


def test_a_file_that_is_no_video(run: Run, says: Says, picture: Path, tmp_path: Path):
    (tmp_path / "text.mp4").write_text("no video")
    says("one")
    outcome = run("caption", tmp_path / "none.mp4", tmp_path / "text.mp4", picture)
    assert outcome.code == 1 and outcome.out == f"{picture}: one\n"
    assert "none.mp4 does not exist" in outcome.err and "text.mp4 is no video" in outcome.err
