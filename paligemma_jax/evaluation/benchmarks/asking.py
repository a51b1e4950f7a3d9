"""Questions of a benchmark -> what a model answers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from PIL import Image

from paligemma_jax.errors import InvalidImageError
from paligemma_jax.evaluation.benchmarks.benchmark import Answer, Benchmark
from paligemma_jax.evaluation.benchmarks.example import Example, Picture, open_picture
from paligemma_jax.evaluation.benchmarks.predictions import Prediction
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing.prompts import split_labels


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are made: questions at once, tokens at most, beams (1 is greedy)."""

    batch_size: int
    max_new_tokens: int
    beams: int


def ask(
    pipeline: Pipeline, benchmark: Benchmark, examples: Sequence[Example], decoding: Decoding
) -> list[Prediction]:
    """One prediction for each example, in any order.

    A picture that several questions share is read once, and encoded once where the questions are
    answered together. One that cannot be read gives predictions with an error.
    """
    opened: dict[Picture, Image.Image | InvalidImageError] = {}
    groups: dict[tuple[Answer, int], list[Example]] = {}
    predictions: list[Prediction] = []
    for example in examples:
        pictures = [_opened(picture, opened) for picture in example.images]
        errors = [one for one in pictures if isinstance(one, InvalidImageError)]
        if errors:
            predictions.append(Prediction(example.id, error=str(errors[0])))
            continue
        kind = example.answer or benchmark.answer
        limit = example.max_new_tokens or decoding.max_new_tokens
        groups.setdefault((kind, limit), []).append(example)
    for (kind, limit), group in groups.items():
        rows = [[_picture(opened[picture]) for picture in one.images] for one in group]
        limits: Any = dict(max_new_tokens=limit, batch_size=decoding.batch_size)
        if kind in (Answer.BOXES, Answer.MASKS):
            predictions += _objects(pipeline, kind, group, [row[0] for row in rows], limits)
        else:
            predictions += _words(pipeline, group, rows, limits, decoding.beams)
    return predictions


def _opened(
    picture: Picture, opened: dict[Picture, Image.Image | InvalidImageError]
) -> Image.Image | InvalidImageError:
    if picture not in opened:
        try:
            opened[picture] = open_picture(picture)
        except InvalidImageError as e:
            opened[picture] = e
    return opened[picture]


def _picture(opened: Image.Image | InvalidImageError) -> Image.Image:
    if isinstance(opened, InvalidImageError):
        raise opened
    return opened


def _words(
    pipeline: Pipeline, examples: Sequence[Example], pictures: Any, limits: Any, beams: int
) -> list[Prediction]:
    prompts = [example.prompt for example in examples]
    if beams > 1:
        answers = pipeline.beam_search(pictures, prompts, beams=beams, **limits)
        return [
            Prediction(example.id, best[0].text if best else "")
            for example, best in zip(examples, answers, strict=True)
        ]
    return [
        Prediction(example.id, answer.text, answer.logprob, len(answer.tokens))
        for example, answer in zip(
            examples, pipeline.generate(pictures, prompts, **limits), strict=True
        )
    ]


def _objects(
    pipeline: Pipeline, kind: Answer, examples: Sequence[Example], pictures: Any, limits: Any
) -> list[Prediction]:
    labels = [split_labels(example.row["labels"]) for example in examples]
    find = pipeline.detect_batch if kind is Answer.BOXES else pipeline.segment_batch
    return [
        Prediction(
            example.id,
            found.text,
            objects=tuple(
                {"label": one.label, "box": list(one.xyxy), "score": one.score} for one in found
            ),
        )
        for example, found in zip(examples, find(pictures, labels, **limits), strict=True)
    ]
