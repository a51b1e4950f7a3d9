"""Boxes of held-out scenes: found once, and then weighed by any score."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from paligemma_jax.demo.scene import KINDS, Scene
from paligemma_jax.evaluation.metrics.all_point_precision import AllPointPrecision
from paligemma_jax.evaluation.metrics.coco_detection import FoundBoxes, TrueBoxes
from paligemma_jax.generation.grammar import detection_grammar
from paligemma_jax.generation.observer import BoxEvidence
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing import prompts
from paligemma_jax.processing.confidence import Score, WeighedAnswer, weigh_tokens
from paligemma_jax.processing.overlaps import intersection_over_union
from paligemma_jax.processing.parsing import Box

MAX_NEW_TOKENS = 64

Labels = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """Prompts about scenes, with the right boxes and the weighed answers; one list entry each."""

    prompts: list[Labels]
    truths: list[list[Box]]
    answers: list[WeighedAnswer]

    def precision(self, score: Score, iou: float = 0.5) -> float:
        """Mean average precision over kinds of shape, in 0..1, of boxes ranked by `score`."""
        metric = AllPointPrecision(iou, last_word=True)
        for place, (right, answer) in enumerate(zip(self.truths, self.answers, strict=True)):
            objects = answer.answer.objects
            found = FoundBoxes(
                list(map(_corners, objects)), [box.label for box in objects], answer.scores(score)
            )
            truth = TrueBoxes(list(map(_corners, right)), [box.label for box in right])
            metric.add(place, found, truth)
        return metric.result()["ap"]

    def judged(self, score: Score, iou: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
        """Scores f64[n] of all boxes, and bool[n]: is there a right one with so high an IoU."""
        values: list[float] = []
        hits: list[bool] = []
        for right, answer in zip(self.truths, self.answers, strict=True):
            objects = answer.answer.objects
            values += answer.scores(score)
            for box in objects:
                same = [other for other in right if other.label == box.label]
                overlaps = intersection_over_union([box], same) if same else np.zeros((1, 0))
                hits.append(bool(overlaps.max(initial=0.0) >= iou))
        return np.array(values), np.array(hits, bool)


def find_kinds(
    pipeline: Pipeline, scenes: Sequence[Scene], pictures: Sequence[np.ndarray]
) -> Found:
    """Asks about every kind of shape in every scene, whether it is there or not."""
    return _find(pipeline, scenes, pictures, [(i, (k,)) for i in range(len(scenes)) for k in KINDS])


def find_pairs(
    pipeline: Pipeline, scenes: Sequence[Scene], pictures: Sequence[np.ndarray]
) -> Found:
    """Asks for two things at once wherever a scene has two."""
    names = [sorted({shape.name for shape in scene.shapes})[:2] for scene in scenes]
    return _find(
        pipeline, scenes, pictures, [(i, tuple(n)) for i, n in enumerate(names) if len(n) == 2]
    )


def _find(
    pipeline: Pipeline,
    scenes: Sequence[Scene],
    pictures: Sequence[np.ndarray],
    questions: Sequence[tuple[int, Labels]],
) -> Found:
    tokenizer = pipeline.processor.tokenizer
    grammars = {labels: detection_grammar(tokenizer, labels) for _, labels in questions}
    answers = pipeline.generate(
        [pictures[i] for i, _ in questions],
        [prompts.detect(labels) for _, labels in questions],
        max_new_tokens=MAX_NEW_TOKENS,
        constraint=[grammars[labels] for _, labels in questions],
        observer=BoxEvidence(tokenizer.loc_start),
        batch_size=64,
    )
    return Found(
        [labels for _, labels in questions],
        [[box for label in labels for box in _right(scenes[i], label)] for i, labels in questions],
        [weigh_tokens(a.tokens, a.logprobs, tokenizer, a.evidence) for a in answers],
    )


def _right(scene: Scene, label: str) -> list[Box]:
    return [Box(label, *s.box) for s in scene.shapes if label in (s.name, s.kind)]


def _corners(box: Box) -> tuple[float, float, float, float]:
    return box.x1, box.y1, box.x2, box.y2
