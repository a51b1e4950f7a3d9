"""caption, answer, ocr, count, generate, text, classify and score: what is asked and printed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import paligemma_jax as pg
from tests.cli.conftest import SURE, UNSURE, Run, Says
from tests.processing.test_video import write_video

PROMPT, LIMIT = "caption en", 6
LABELS = ["red circle", "star", "blue square"]


@pytest.fixture
def model(store: Path) -> list[object]:
    return ["--model", store, "--dtype", "float32", "--max-new-tokens", LIMIT]


def documents(run: Run, *argv: object) -> list[dict[str, Any]]:
    outcome = run(*argv, "--json")
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


@pytest.mark.parametrize(
    ("argv", "prompt"),
    [
        (["caption", "I"], "caption en"),
        (["caption", "I", "--language", "de"], "caption de"),
        (["ocr", "I"], "ocr"),
        (["answer", "I", "what is it?"], "answer en what is it?"),
        (["answer", "--language", "fr", "I", "quoi ?"], "answer fr quoi ?"),
        (["answer", "I", "--json", "what is it?"], "answer en what is it?"),
        (["count", "I", "red cars"], "answer en how many red cars are there?"),
        (["generate", "I", "caption en"], "caption en"),
        (["detect", "I", "cat ; red dog;"], "detect cat ; red dog"),
        (["segment", "I", "cat ; red dog;"], "segment cat ; red dog"),
    ],
)
def test_prompt(run: Run, says: Says, image: Path, argv: list[str], prompt: str):
    calls = says("3")
    assert run(*[image if a == "I" else a for a in argv]).code == 0
    assert calls == [[prompt]]


def test_lines_have_names_where_there_are_several_images(run: Run, says: Says, image: Path):
    says("a red circle")
    assert run("caption", image).out == "a red circle\n"
    calls = says("one", "two\nlines", "three")
    outcome = run("ocr", image, image, image, "--batch-size", 2)
    assert outcome.out == f"{image}: one\n{image}: two\n{image}: lines\n{image}: three\n"
    assert [len(prompts) for prompts in calls] == [2, 1]


def test_json_lines(run: Run, says: Says, pipeline: pg.Pipeline, image: Path):
    says("ein Café", "zwei")
    tokens = [*pipeline.processor.tokenizer.encode("ein Café"), 1]
    first, second = documents(run, "caption", image, image)
    assert first == {
        "file": str(image),
        "prompt": "caption en",
        "text": "ein Café",
        "tokens": tokens,
        "logprob": pytest.approx(math.log(SURE) * (len(tokens) - 1) + math.log(UNSURE)),
        "finish_reason": "eos",
        "prompt_tokens": 0,
        "image_tokens": 0,
    }
    assert second["text"] == "zwei"


def test_multi_image_is_one_prompt_about_all(run: Run, says: Says, image: Path, tmp_path: Path):
    calls = says("yes")
    command = ["answer", image, image, "the same?", "--multi-image"]
    (document,) = documents(run, *command)
    assert document["files"] == [str(image)] * 2 and document["text"] == "yes"
    assert calls == [["answer en the same?"]]
    outcome = run("answer", image, tmp_path / "none.png", "the same?", "--multi-image")
    assert outcome.code == 1 and "none.png" in outcome.err and outcome.out == ""


def test_count_is_a_number(run: Run, says: Says, image: Path):
    says("many", "4")
    outcome = run("count", image, image, "cars", "--json")
    first, second = map(json.loads, outcome.out.splitlines())
    assert outcome.code == 1
    assert first["text"] == "many" and "expected a number" in first["error"]
    assert second["count"] == 4
    assert "'many'" in outcome.err and "Traceback" not in outcome.err


def test_unreadable_images_do_not_stop_the_others(
    run: Run, says: Says, image: Path, tmp_path: Path
):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:200])
    (tmp_path / "text.mp4").write_text("no video")
    names = ["none.png", "text.png", "cut.png", "none.mp4", "text.mp4"]
    says("one", "two")
    outcome = run("caption", image, *[tmp_path / name for name in names], image)
    assert outcome.code == 1
    assert outcome.out == f"{image}: one\n{image}: two\n"
    messages = outcome.err.splitlines()
    for message, name in zip(messages, names, strict=True):
        assert message.startswith("paligemma: error:") and name in message


def test_no_model_is_loaded_without_an_image_or_with_wrong_options(
    run: Run, image: Path, tmp_path: Path
):
    outcome = run("caption", tmp_path / "none.png", "--model", tmp_path / "no-model")
    assert outcome.code == 1 and "none.png" in outcome.err and "no-model" not in outcome.err
    for argv, words in (
        (["--top-p", "1.5"], ["--top-p: expected"]),
        (["--temperature", "-1"], ["--temperature: expected"]),
        (["--num-beams", "2", "--top-k", "3"], ["--top-k", "--num-beams"]),
        (["--length-penalty", "1"], ["--length-penalty", "--best-of or --num-beams"]),
        (["--max-new-tokens", "9999999"], ["--max-new-tokens: expected"]),
        (["--min-new-tokens", "9", "--max-new-tokens", "8"], ["--min-new-tokens: expected"]),
        (["--num-beams", "2", "--num-return-sequences", "3"], ["at most --num-beams, 2"]),
        (["--best-of", "0"], ["--best-of: expected"]),
        (["--best-of", "4", "--temperature", "0"], ["--best-of: ", "--temperature=1.0"]),
        (["--top-logprobs", "2"], ["--top-logprobs", "--json"]),
    ):
        outcome = run("caption", image, *argv, "--model", tmp_path / "no-model")
        assert outcome.code == 2 and outcome.out == ""
        assert all(word in outcome.err for word in words) and "_" not in outcome.err.split("\n")[-2]


def test_a_search_that_finds_nothing_is_an_error_of_its_image(
    run: Run, pipeline: pg.Pipeline, image: Path, monkeypatch: pytest.MonkeyPatch
):
    found = pipeline.beam_search([image], [PROMPT], max_new_tokens=2, early_stopping=False)
    monkeypatch.setattr(pg.Pipeline, "beam_search", lambda *_, **__: [[], *found])
    monkeypatch.setattr("paligemma_jax.loading.from_pretrained", lambda *_, **__: pipeline)
    for command in (["caption", image, image], ["text", "one", "two"]):
        outcome = run(*command, "--num-beams", 2, "--json")
        first, second = map(json.loads, outcome.out.splitlines())
        assert outcome.code == 1 and "found no answer" in first["error"]
        assert second["text"] == found[0][0].text and "error" not in second


def test_the_last_seed_is_followed_by_the_first(run: Run, model: list[object], image: Path):
    argv = ["--temperature", 1, "--max-new-tokens", 2, *model]
    pair = documents(run, "caption", image, image, "--seed", 2**64 - 1, *argv)
    (first,) = documents(run, "caption", image, "--seed", 0, *argv)
    assert pair[1]["tokens"] == first["tokens"]


def test_sampling_options(
    run: Run, model: list[object], image: Path, pipeline: pg.Pipeline, tmp_path: Path
):
    """An image's samples depend on the seed and its place alone."""
    argv = ["--temperature", 3, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.001, "--seed", 7]
    options: Any = dict(temperature=3.0, top_k=50, top_p=0.9, min_p=0.001, max_new_tokens=LIMIT)
    first, second = documents(run, "generate", image, image, PROMPT, *argv, *model)
    want = pipeline.generate([image] * 2, [PROMPT] * 2, seed=7, **options)
    assert [first["tokens"], second["tokens"]] == [list(one.tokens) for one in want]
    images = [image, tmp_path / "none.png", image]
    command = ["generate", *images, PROMPT, *argv, *model, "--json", "--batch-size", 1]
    found = [json.loads(line) for line in run(*command).out.splitlines()]
    third = pipeline.generate([image], [PROMPT], seed=9, **options)[0]
    assert found[0]["tokens"] == first["tokens"] and "error" in found[1]
    assert found[2]["tokens"] == list(third.tokens)


def test_best_of_and_beam_search(run: Run, model: list[object], image: Path, pipeline: pg.Pipeline):
    argv = ["caption", image, "--best-of", 3, "--length-penalty", 1, "--top-k", 40, *model]
    (said,) = documents(run, *argv)
    options: Any = {"max_new_tokens": LIMIT}
    (row,) = pipeline.best_of([image], [PROMPT], n=3, length_penalty=1.0, top_k=40, **options)
    assert [one["tokens"] for one in said["generations"]] == [list(one.tokens) for one in row]
    assert said["tokens"] == said["generations"][0]["tokens"]
    assert said["score"] == pytest.approx(row[0].logprob / len(row[0].tokens))
    assert run(*argv).out == f"{row[0].text}\n"
    argv = ["caption", image, "--num-beams", 3, *model]
    (said,) = documents(run, *argv)
    (best,) = documents(run, *argv, "--num-return-sequences", 1)
    assert [one["tokens"] for one in best["generations"]] == [said["tokens"]]
    (row,) = pipeline.beam_search([image], [PROMPT], num_beams=3, num_return_sequences=3, **options)
    assert [one["tokens"] for one in said["generations"]] == [list(one.tokens) for one in row]
    assert said["text"] == row[0].text and said["score"] == pytest.approx(said["logprob"])


def test_answer_prefix_stop_and_log_probabilities(
    run: Run, model: list[object], image: Path, pipeline: pg.Pipeline
):
    plain = pipeline.generate([image], [PROMPT], answer_prefixes=["red"], max_new_tokens=LIMIT)[0]
    stop = plain.text[len(plain.text) // 2 :]
    argv = ["--answer-prefix", "red", "--stop", "never said", "--stop", stop, "--logprobs", *model]
    (said,) = documents(run, "caption", image, *argv, "--top-logprobs", 2)
    assert said["answer_prefix"] == "red"
    assert said["stop"] == stop and said["finish_reason"] == "stop"
    assert said["text"] == plain.text.partition(stop)[0]
    assert sum(said["logprobs"]) == pytest.approx(said["logprob"])
    assert [len(top) for top in said["top_logprobs"]] == [2] * len(said["tokens"])
    lines = run("caption", image, *argv).out.splitlines()
    assert len(lines) >= 1 + len(said["tokens"])
    assert lines[-1].startswith(f"{said['logprobs'][-1]:.4f} ")
    (said,) = documents(run, "ocr", image, "--min-new-tokens", 5, *model)
    assert len(said["tokens"]) >= 5


def test_streams_of_several_images(
    run: Run, model: list[object], image: Path, pipeline: pg.Pipeline, tmp_path: Path
):
    rows = pipeline.generate([image] * 2, [PROMPT] * 2, max_new_tokens=LIMIT)
    outcome = run("caption", image, tmp_path / "none.png", image, "--stream", *model)
    lines = [f"{image}: {line}" for row in rows for line in row.text.split("\n")]
    assert outcome.code == 1 and "none.png" in outcome.err
    assert outcome.out == "".join(f"{line}\n" for line in lines)
    question = ["answer", image, image, "why?", "--multi-image", *model]
    assert run(*question, "--stream").out == run(*question).out


def test_text_needs_no_image(run: Run, model: list[object], pipeline: pg.Pipeline):
    prompts = ["caption en", "ocr"]
    rows = pipeline.generate(None, prompts, max_new_tokens=LIMIT)
    for said, prompt, row in zip(
        documents(run, "text", *prompts, *model), prompts, rows, strict=True
    ):
        assert said["prompt"] == prompt and said["text"] == row.text
        assert said["tokens"] == list(row.tokens) and said["image_tokens"] == 0
        assert said["logprob"] == pytest.approx(row.logprob, abs=1e-4)
    assert run("text", "ocr", "--stream", *model).out == f"{rows[1].text}\n"
    lines = run("text", *prompts, *model).out
    assert lines == run("text", *prompts, "--stream", *model).out


def test_model_options(run: Run, model: list[object], image: Path):
    outcome = run("ocr", image, *model, "--resolution", 16)
    assert outcome.code == 0, outcome.err
    outcome = run("ocr", image, *model, "--quantize", "int3")
    assert outcome.code == 1 and "int3" in outcome.err
    (one,) = documents(run, "caption", image, *model)
    (two,) = documents(run, "caption", image, *model, "--mesh", "tensor=2")
    assert (two["text"], two["tokens"]) == (one["text"], one["tokens"])
    assert two["logprob"] == pytest.approx(one["logprob"], abs=1e-3)
    outcome = run("caption", image, *model, "--mesh", "tensor=3")
    assert outcome.code == 1 and "--mesh fsdp=-1" in outcome.err


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.MP4"
    path.write_bytes(write_video())
    return path


def test_a_video_is_frames_of_one_prompt(
    run: Run, model: list[object], pipeline: pg.Pipeline, image: Path, video: Path
):
    frames = pg.read_frames(video, 3)
    question = ["answer", video, image, "why?", "--frames", 3, *model]
    prompts = ["answer en why?"] * 2
    alone = pipeline.generate([frames, image], prompts, max_new_tokens=LIMIT)
    said = documents(run, *question)
    assert [one["tokens"] for one in said] == [list(one.tokens) for one in alone]
    (said,) = documents(run, *question, "--multi-image")
    joined = [[*frames, pg.load_image(image)]]
    together = pipeline.generate(joined, prompts[:1], max_new_tokens=LIMIT)
    assert said["files"] == [str(video), str(image)]
    assert said["tokens"] == list(together[0].tokens)


def test_commands_that_take_no_videos_say_which_do(run: Run, says: Says, video: Path):
    says()
    for command in (["ocr", video], ["detect", video, "cat"], ["segment", video, "cat"]):
        outcome = run(*command)
        assert outcome.code == 1 and "the video" in outcome.err and "answer" in outcome.err


def test_classify_lines(run: Run, says: Says, pipeline: pg.Pipeline, image: Path):
    says()
    outcome = run("classify", image, " ; ".join(LABELS) + ";")
    best = str(pipeline.classify(image, LABELS)).splitlines()
    assert outcome.out.splitlines() == best
    command = ["classify", image, image, " ; ".join(LABELS)]
    assert run(*command).out == f"{image}: {best[0]}\n" * 2
    lines = run(*command, "--top", 2).out.splitlines()
    assert lines == [f"{image}: {line}" for line in best[:2]] * 2


def test_classify_json(run: Run, says: Says, pipeline: pg.Pipeline, image: Path):
    says()
    options = ["--question", "quoi ?", "--language", "fr", "--batch-size", 1]
    found = pipeline.classify(image, ["star", "circle"], "quoi ?", "fr")
    for said in documents(run, "classify", image, image, "star ; circle", *options):
        assert said["file"] == str(image) and said["prompt"] == "answer fr quoi ?"
        assert said["label"] == found.best
        assert [row["label"] for row in said["labels"]] == [name for name, _ in found.ranked()]
        assert math.fsum(row["probability"] for row in said["labels"]) == pytest.approx(1)
        assert said["coverage"] == pytest.approx(found.coverage, rel=1e-4)
    for labels in (";", "cat ; cat"):
        outcome = run("classify", image, labels)
        assert outcome.code == 1 and "label" in outcome.err and outcome.out == ""


def test_score(run: Run, says: Says, pipeline: pg.Pipeline, image: Path, tmp_path: Path):
    says()
    answers = ["yes", "", "a\nb", "yes"]
    outcome = run("score", image, "answer en why?", "--candidates", *answers)
    ranked = sorted(pipeline.score(image, "answer en why?", answers), key=lambda a: -a.logprob)
    shown = {"": "(empty)", "a\nb": "a\\nb"}
    assert outcome.out.splitlines() == [
        f"{a.logprob:.3f} {shown.get(a.text, a.text)}" for a in ranked
    ]
    command = ["score", image, tmp_path / "none.png", "ocr", "--candidates", "A", "B C", "--json"]
    good, bad = map(json.loads, run(*command).out.splitlines())
    assert "none.png" in bad["error"] and good["prompt"] == "ocr"
    scored = {a.text: a for a in pipeline.score(image, "ocr", ["A", "B C"])}
    for row in good["candidates"]:
        assert row["tokens"] == list(scored[row["text"]].tokens)
        assert row["logprobs"] == pytest.approx(scored[row["text"]].logprobs, abs=1e-4)
    command = ["score", image, image, "ocr", "--multi-image", "--candidates", "A", "B"]
    scored = {a.text: a.logprob for a in pipeline.score([image, image], "ocr", ["A", "B"])}
    assert sorted(run(*command).out.splitlines()) == sorted(
        f"{p:.3f} {t}" for t, p in scored.items()
    )
    outcome = run("score", image, "ocr", "--candidates", "why " * 600)
    assert outcome.code == 1 and "Candidate 0" in outcome.err
