"""Runs that stop and go on, what is scored, and what is written."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import CheckpointError, ConfigError, DatasetError
from paligemma_jax.evaluation.evaluate import (
    EvaluationResult,
    evaluate,
    write_metrics,
    write_submission,
)
from paligemma_jax.evaluation.examples import read_examples
from paligemma_jax.evaluation.metrics import ObjectMask
from paligemma_jax.evaluation.report import by_confidence, by_length, confusion, write_report
from paligemma_jax.evaluation.tasks import find_task
from paligemma_jax.generation.results import Generation
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.masks import MaskCodec

WIDTH, HEIGHT = 40, 20


def generation(text: str) -> Generation:
    return Generation(text=text, tokens=(5, 1), logprobs=(-0.1, -0.2), finish_reason="eos")


class Fake:
    """Answers a question by its number; counts what it was asked."""

    def __init__(self, answers: dict[str, str], codec: MaskCodec | None = None):
        self.answers, self.mask_codec = answers, codec
        self.asked: list[str] = []
        self.options: list[dict[str, Any]] = []

    def generate(self, images: Any, prompts: Sequence[str], **options: Any) -> list[Generation]:
        assert all(image.size == (WIDTH, HEIGHT) for several in images for image in several)
        self.options.append(options)
        self.asked += prompts
        texts = [self.answers[prompt.split()[-1]] for prompt in prompts]
        return [generation(text) for text in texts]

    def beam_search(self, images: Any, prompts: Sequence[str], **options: Any) -> Any:
        self.options.append(options)
        return [[SimpleNamespace(text=f"a {p.split()[-1]}")] if p else [] for p in prompts]

    def detect_batch(self, images: Any, labels: Any, **options: Any) -> list[Detections]:
        text = "<loc0000><loc0000><loc1023><loc0512> cat"
        found = Detections.from_text(text, WIDTH, HEIGHT)
        return [dataclasses.replace(found, scores=(0.5,)) for _ in images]


def fake(answers: dict[str, str], codec: MaskCodec | None = None) -> tuple[Fake, Pipeline]:
    made = Fake(answers, codec)
    return made, cast(Pipeline, made)


def write(folder: Path, task: str, rows: Sequence[dict[str, Any]]) -> Path:
    for name in {row.get("image") for row in rows} - {None, "lost.png"}:
        Image.new("RGB", (WIDTH, HEIGHT), "red").save(folder / str(name))
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [
        {"id": i, "image": "a.png", "question": f"question {i}", "answer": "cat"} | fields
        for i in range(count)
    ]


def test_a_run_that_stops_goes_on(tmp_path: Path):
    examples = read_examples(find_task("gqa"), write(tmp_path, "gqa", questions(20)))
    model, pipeline = fake({str(i): "cat" if i < 15 else "dog" for i in range(20)})
    out, done = tmp_path / "out", []

    def stop(count: int) -> None:
        done.append(count)
        if sum(done) >= 8:
            raise KeyboardInterrupt

    settings: dict[str, Any] = dict(out=out, model="m", batch_size=2, resamples=50)
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipeline, find_task("gqa"), examples, progress=stop, **settings)
    with (out / "predictions.jsonl").open("a") as file:
        file.write('{"id": 8, "te')  # the process died while writing
    assert len(model.asked) == 8
    counts: list[int] = []
    result = evaluate(pipeline, find_task("gqa"), examples, progress=counts.append, **settings)
    assert len(model.asked) == 20 and len(set(model.asked)) == 20
    assert counts[0] == 8 and sum(counts) == 20
    assert result.main.value == 75 and result.main.low < 75 < result.main.high
    again = evaluate(pipeline, find_task("gqa"), examples, **settings)
    assert len(model.asked) == 20
    assert again.scores == result.scores
    settings["model"] = "other"
    with pytest.raises(ConfigError, match="model was 'm' and is 'other'"):
        evaluate(pipeline, find_task("gqa"), examples, **settings)
    settings["model"] = "m"
    (out / "predictions.jsonl").write_text('{"nothing": 1}\n')
    with pytest.raises(DatasetError, match="not a prediction"):
        evaluate(pipeline, find_task("gqa"), examples, **settings)


@pytest.fixture(scope="module")
def pope(tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    folder = tmp_path_factory.mktemp("pope")
    rows = questions(6, answer="yes", split="random")
    rows[4] |= {"answer": "no", "split": "popular"}
    rows[5] |= {"image": "lost.png"}
    examples = read_examples(find_task("pope"), write(folder, "pope", rows))
    _, pipeline = fake({"0": "yes", "1": "Yes", "2": "no", "3": "<b>maybe", "4": "no", "5": "yes"})
    return evaluate(pipeline, find_task("pope"), examples, resamples=20)


def test_images_that_cannot_be_read_are_skipped_and_named(pope: EvaluationResult):
    assert pope.counts == {"num": 5, "skipped": 1, "num/random": 4, "num/popular": 1}
    assert "lost.png" in pope.metric.skipped[5]
    assert pope.scores["acc/random"].value == 0.5
    assert pope.main.value == 75  # mean over splits
    with pytest.raises(DatasetError, match="no examples"):
        lost = [example for example in pope.examples if example.id == 5]
        evaluate(fake({})[1], pope.task, lost)


def test_where_errors_lie(pope: EvaluationResult):
    assert confusion(pope) == {
        "yes": {"yes": 2, "no": 1, "other": 1},
        "no": {"yes": 0, "no": 1, "other": 0},
    }
    ((name, confidence, score, count),) = by_confidence(pope)
    assert (name, count) == ("0.7-0.8", 5)
    assert confidence == pytest.approx(np.exp(-0.3)) and score == pytest.approx(3 / 5)
    assert [(name, count) for name, _, _, count in by_length(pope)] == [("1", 5)]


def test_metrics_and_report(pope: EvaluationResult, tmp_path: Path):
    kept = json.loads(write_metrics(pope, tmp_path, "m").read_text())
    assert kept == json.loads(json.dumps(pope.to_dict("m")))
    assert kept["metric"] == "acc/mean" and kept["value"] == 75
    assert kept["skipped"].keys() == {"5"} and "POPE" in kept["definition"]
    page = write_report(pope, tmp_path, model="a <model>").read_text()
    for said in (
        "a &lt;model&gt;",
        "&lt;b&gt;maybe",
        "85.98",
        "Skipped",
        "data:image/jpeg;base64,",
    ):
        assert said in page
    assert "<b>maybe" not in page and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("vqav2", {"question_id": 0, "answer": "cat"}),
        ("docvqa", {"questionId": 0, "answer": "cat"}),
        ("vizwizvqa", {"image": "a.png", "answer": "cat"}),
        ("gqa", {"questionId": "0", "prediction": "cat"}),
        ("okvqa", None),
    ],
)
def test_submission_files(tmp_path: Path, task: str, row: dict[str, Any] | None):
    rows = questions(1, id="0", answers=["cat"] * 10, answer_type="other")
    evaluated = find_task(task)
    examples = read_examples(evaluated, write(tmp_path, task, rows))
    done = evaluate(fake({"0": "cat"})[1], evaluated, examples, resamples=2)
    path = write_submission(done, tmp_path)
    assert (path and json.loads(path.read_text())) == (None if row is None else [row])


def test_decoding_is_the_tasks_or_as_asked(tmp_path: Path):
    rows = [{"id": i, "image": "a.png", "captions": ["a en"]} for i in range(2)]
    evaluated = find_task("cococap")
    examples = read_examples(evaluated, write(tmp_path, "cococap", rows))
    model, pipeline = fake({"en": "a cat"})
    evaluate(pipeline, evaluated, examples, resamples=2)
    evaluate(
        pipeline, evaluated, examples, resamples=2, num_beams=1, max_new_tokens=7, batch_size=3
    )
    assert model.options == [
        {"num_beams": 2, "max_new_tokens": 32, "batch_size": 8},
        {"max_new_tokens": 7, "batch_size": 3},
    ]
    short = read_examples(evaluated, tmp_path, limit=1, prompt="describe en")
    assert [example.prompt for example in short] == ["describe en"]


def test_boxes(tmp_path: Path):
    objects = [{"label": "cat", "box": [0, 0, 20, 20]}, {"label": "cat", "box": [20, 0, 40, 20]}]
    rows = [{"id": 1, "image": "a.png", "labels": "cat", "objects": objects}]
    evaluated = find_task("detection")
    examples = read_examples(evaluated, write(tmp_path, "detection", rows))
    done = evaluate(fake({})[1], evaluated, examples, out=tmp_path / "out", resamples=2)
    assert done.scores["AP"].value == pytest.approx(51 / 101)
    assert done.scores["recall@50"].value == 0.5
    again = evaluate(fake({})[1], evaluated, examples, out=tmp_path / "out", resamples=2)
    assert again.scores == done.scores  # from the file alone
    assert write_report(done, tmp_path).read_text().count("<figcaption>right") == 2
    with pytest.raises(DatasetError, match="at least one label"):
        read_examples(evaluated, write(tmp_path, "detection", [rows[0] | {"labels": []}]))
    wrong = rows[0] | {"objects": [{"label": "cat"}]}
    with pytest.raises(DatasetError, match="has no label or no box"):
        read_examples(evaluated, write(tmp_path, "detection", [wrong]))


class Codec:
    """Decodes every mask as the left half of its box."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        masks = np.zeros((len(codes), 64, 64), np.float32)
        masks[:, :, :32] = 1
        return masks


def test_masks(tmp_path: Path):
    left = np.zeros((HEIGHT, WIDTH), np.uint8)
    left[:, :20] = 255
    Image.fromarray(left).save(tmp_path / "left.png")
    rows = [
        {"id": i, "image": "a.png", "expression": f"thing {i}", "mask": "left.png"}
        for i in range(3)
    ]
    evaluated = find_task("refcoco_seg")
    assert evaluated.output == "mask"
    examples = read_examples(evaluated, write(tmp_path, "refcoco_seg", rows))
    assert isinstance(examples[0].reference, ObjectMask)
    codes = "".join(f"<seg{i:03d}>" for i in range(16))
    answers = {
        "0": f"<loc0000><loc0000><loc1023><loc1023>{codes} thing",
        "1": "<loc0000><loc0000><loc1023><loc1023> thing",
        "2": f"<loc0000><loc0000><loc1023><loc0512>{codes} thing",
    }
    codec = cast(MaskCodec, Codec())
    done = evaluate(fake(answers, codec)[1], evaluated, examples, resamples=2)
    assert done.scores["invalid"].value == pytest.approx(1 / 3)
    assert done.main.value == pytest.approx(100 * (1 + 0 + 0.5) / 3)
    assert "<figcaption>found" in write_report(done, tmp_path, codec=codec).read_text()
    with pytest.raises(CheckpointError, match="no mask codec"):
        evaluate(fake(answers)[1], evaluated, examples)
