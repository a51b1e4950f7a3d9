"""The demo world as a benchmark: its questions, and what answers are worth."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from paligemma_jax.evaluation.demo import (
    DEMO,
    MASKS,
    ONE_LABEL,
    TARGETS,
    TWO_LABELS,
    demo_examples,
    demo_table,
    evaluate_demo,
)
from paligemma_jax.evaluation.evaluate import EvaluationResult, evaluate
from paligemma_jax.evaluation.report import write_report
from paligemma_jax.generation.results import Generation
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.location_tokens import Box, format_answer
from paligemma_jax.processing.masks import MaskCodec

CODES = tuple(range(16))


def generation(text: str) -> Generation:
    return Generation(text=text, tokens=(5, 1), logprobs=(-0.1, -0.2), finish_reason="eos")


class Codec:
    """Decodes every mask as its whole box."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.ones((len(codes), 64, 64), np.float32)


class Knowing:
    """Knows the right answer to every question; says "no" to all in a foreign language."""

    def __init__(self, scenes: int):
        self.mask_codec = cast(MaskCodec, Codec())
        self.right = {}
        for one in demo_examples(scenes):
            self.right.setdefault(one.prompt, []).append(one.reference)

    def generate(self, images: Any, prompts: Sequence[str], **options: Any) -> list[Generation]:
        texts = [self.right[prompt].pop(0) for prompt in prompts]
        words = ["no" if p == "caption de" else t for p, t in zip(prompts, texts, strict=True)]
        return [generation(text) for text in words]

    def detect_batch(self, images: Any, labels: Any, **options: Any) -> list[Detections]:
        every = []
        for row in labels:
            truth = self.right["detect " + " ; ".join(row)].pop(0)
            boxes = [Box(name, *(np.array(box)[[1, 0, 3, 2]] / 224)) for name, box
                     in zip(truth.labels, truth.xyxy, strict=True)]  # fmt: skip
            found = Detections.from_text(format_answer(boxes), 224, 224)
            every.append(dataclasses.replace(found, scores=(0.5,) * len(boxes)))
        return every

    def segment_batch(self, images: Any, labels: Any, **options: Any) -> list[Detections]:
        boxes = [[Box(row[0], 0, 0, 1, 1, CODES)] for row in labels]
        every = [Detections.from_text(format_answer(row), 224, 224) for row in boxes]
        return [dataclasses.replace(found, scores=(0.5,)) for found in every]


def knowing(scenes: int) -> Pipeline:
    return cast(Pipeline, Knowing(scenes))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    out = tmp_path_factory.mktemp("out")
    return evaluate(knowing(4), DEMO, demo_examples(4), out=out, batch_size=64, resamples=20)


def test_fewer_scenes_are_the_first_ones():
    few, more = demo_examples(2), demo_examples(3)
    assert [e.id for e in few] == [e.id for e in more if int(str(e.id)[:4]) < 2]
    assert len({e.id for e in more}) == len(more)
    assert {e.output for e in few} == {None, "boxes", "masks"}


def test_every_score_counts_its_own_questions(done: EvaluationResult):
    values = {name: figure.value for name, figure in done.scores.items()}
    assert values.pop("caption de") == 0
    masks = values.pop(MASKS)
    right = [e.reference for e in done.examples if MASKS in e.groups]
    overlaps = [[row[0].mean(), *[0.0] * (len(row) - 1)] for row in right if len(row) == 1]
    assert len(overlaps) == len(right) and masks == pytest.approx(np.mean(overlaps))
    assert values == dict.fromkeys(values, 1.0)
    assert done.counts[f"num/{ONE_LABEL}"] == 20 and done.counts["num/caption en"] == 4
    assert values.keys() >= {*TARGETS, TWO_LABELS} - {"caption de", MASKS, "ocr exact"}
    low_to_high = done.scores[MASKS]
    assert low_to_high.low < low_to_high.value < low_to_high.high


def test_the_table_is_that_of_the_card(done: EvaluationResult):
    table = demo_table(done)
    assert "| caption en | 100.0 % | 90 % | 4 |\n" in table
    assert "\n|   two labels in a prompt | 100.0 % |  |" in table
    again = evaluate_demo(knowing(4), 4).scores
    assert {k: v.value for k, v in again.items()} == {k: v.value for k, v in done.scores.items()}


def test_report_draws_boxes_and_masks(done: EvaluationResult, tmp_path: Path):
    page = write_report(
        done, tmp_path, model="demo", codec=cast(MaskCodec, Codec()), examples=30
    ).read_text()
    assert "model card" in page and "0.996" in page
    # Two of each figure: boxes of one name and of two, and masks; worst and best.
    assert page.count("<figcaption>right") == 2 * 2 * 3
    assert "The demo model&#x27;s card: every score in 0..1" in page
