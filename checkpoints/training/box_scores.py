"""Which score tells right boxes from wrong ones: `python -m checkpoints.training.box_scores`.

Held-out scenes are asked for every kind of shape, there or not, and for two things at once. Each
definition of a score ranks the same boxes: mean average precision at two overlaps, the area under
the ROC curve of right against wrong boxes, and the expected calibration error (10 bins of equal
width; Guo et al., arXiv 1706.04599). A constant score keeps the order in which boxes were named.

Boxes of held-out scenes: found once, and then weighed by any score.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paligemma_jax.demo.render import render
from paligemma_jax.demo.scene import KINDS, Scene, held_out_scenes
from paligemma_jax.evaluation.demo import IMAGE_SIZE
from paligemma_jax.evaluation.detection_metrics import AllPointPrecision, FoundBoxes, TrueBoxes
from paligemma_jax.generation.detection_grammar import detection_grammar
from paligemma_jax.generation.token_statistics import LocationStatistics
from paligemma_jax.loading import from_pretrained
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing import prompts
from paligemma_jax.processing.box_scores import (
    NEAR_RADII,
    AnswerLogprobs,
    ObjectLogprobs,
    Score,
    box_score,
    edge_score,
    measured,
    objectness,
    parse_logprobs,
    probability,
)
from paligemma_jax.processing.detections import intersection_over_union
from paligemma_jax.processing.location_tokens import Box

MAX_NEW_TOKENS = 64

Labels = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """Prompts about scenes, with the right boxes and the weighed answers; one list entry each."""

    prompts: list[Labels]
    truths: list[list[Box]]
    answers: list[AnswerLogprobs]

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


def find_kinds(pipeline: Pipeline, scenes: Sequence[Scene], images: Sequence[np.ndarray]) -> Found:
    """Asks about every kind of shape in every scene, whether it is there or not."""
    return _find(pipeline, scenes, images, [(i, (k,)) for i in range(len(scenes)) for k in KINDS])


def find_pairs(pipeline: Pipeline, scenes: Sequence[Scene], images: Sequence[np.ndarray]) -> Found:
    """Asks for two things at once wherever a scene has two."""
    names = [sorted({shape.name for shape in scene.shapes})[:2] for scene in scenes]
    return _find(
        pipeline, scenes, images, [(i, tuple(n)) for i, n in enumerate(names) if len(n) == 2]
    )


def _find(
    pipeline: Pipeline,
    scenes: Sequence[Scene],
    images: Sequence[np.ndarray],
    questions: Sequence[tuple[int, Labels]],
) -> Found:
    tokenizer = pipeline.processor.tokenizer
    grammars = {labels: detection_grammar(tokenizer, labels) for _, labels in questions}
    answers = pipeline.generate(
        [images[i] for i, _ in questions],
        [prompts.detect(labels) for _, labels in questions],
        max_new_tokens=MAX_NEW_TOKENS,
        constraint=[grammars[labels] for _, labels in questions],
        token_statistics=LocationStatistics(tokenizer.loc_start),
        batch_size=64,
    )
    return Found(
        [labels for _, labels in questions],
        [[box for label in labels for box in _right(scenes[i], label)] for i, labels in questions],
        [parse_logprobs(a.tokens, a.logprobs, tokenizer, a.extras) for a in answers],
    )


def _right(scene: Scene, label: str) -> list[Box]:
    return [Box(label, *s.box) for s in scene.shapes if label in (s.name, s.kind)]


def _corners(box: Box) -> tuple[float, float, float, float]:
    return box.x1, box.y1, box.x2, box.y2


BINS = 10


def constant(one: ObjectLogprobs) -> float:
    """What every other implementation gives."""
    return 1.0


def near(one: ObjectLogprobs) -> list[float]:
    """Log-mass within 8 bins of each location."""
    return [masses[NEAR_RADII.index(8)] for masses in measured(one.near_mass)]


def label_score(one: ObjectLogprobs) -> float:
    """Probability of the label given the box; 1 where there is no label."""
    return probability(sum(one.label))


def near_product(one: ObjectLogprobs) -> float:
    """Product over the four corners of the mass near the chosen location."""
    return probability(sum(near(one)))


def location_geometric(one: ObjectLogprobs) -> float:
    """Geometric mean of the probabilities of the four location tokens."""
    return probability(sum(one.locations) / 4)


SCORES: dict[str, Score] = {
    "constant": constant,
    "product of locations": lambda one: probability(sum(one.locations)),
    "geometric mean of locations": location_geometric,
    "minimum of locations": lambda one: probability(min(one.locations)),
    "product of near mass": near_product,
    "geometric mean of near mass": lambda one: probability(sum(near(one)) / 4),
    "minimum of near mass": lambda one: probability(min(near(one))),
    "product of edges": lambda one: edge_score(one) ** 4,
    "label": label_score,
    "first location against the end": lambda one: probability(measured(one.location_mass)[0]),
    "objectness": objectness,
    "objectness x label": lambda one: objectness(one) * label_score(one),
    "objectness x product of edges": lambda one: objectness(one) * edge_score(one) ** 4,
    "objectness x label x product of edges": (
        lambda one: objectness(one) * label_score(one) * edge_score(one) ** 4
    ),
    "objectness x label x edges": box_score,
    "objectness x label x product of near mass": (
        lambda one: objectness(one) * label_score(one) * near_product(one)
    ),
}


def roc_area(scores: np.ndarray, right: np.ndarray) -> float:
    """Probability that a right box scores higher than a wrong one; ties count half."""
    wrong_scores, right_scores = scores[~right], scores[right]
    if not wrong_scores.size or not right_scores.size:
        return float("nan")
    above = (right_scores[:, None] > wrong_scores).mean()
    return float(above + 0.5 * (right_scores[:, None] == wrong_scores).mean())


def reliability(scores: np.ndarray, right: np.ndarray) -> list[tuple[float, float, int]]:
    """For each bin of scores that is not empty: mean score, share right, number of boxes."""
    places = np.minimum((scores * BINS).astype(int), BINS - 1)
    return [
        (float(scores[mine].mean()), float(right[mine].mean()), int(mine.sum()))
        for place in range(BINS)
        if (mine := places == place).any()
    ]


def calibration_error(scores: np.ndarray, right: np.ndarray) -> float:
    """Mean distance of score and share right over boxes, in 0..1."""
    bins = reliability(scores, right)
    return sum(abs(score - share) * count for score, share, count in bins) / scores.size


def table(kinds: Found, pairs: Found) -> str:
    """Every score's figures, in Markdown."""
    lines = [
        "| score | mAP 0.5 | mAP 0.75 | two labels, mAP 0.5 | ROC area | calibration error |",
        "|---|---|---|---|---|---|",
    ]
    for name, score in SCORES.items():
        judged = [found.judged(score) for found in (kinds, pairs)]
        scores, right = (np.concatenate(parts) for parts in zip(*judged, strict=True))
        figures = (kinds.precision(score), kinds.precision(score, 0.75), pairs.precision(score))
        shown = " | ".join(f"{100 * value:.1f}" for value in figures)
        errors = f"{roc_area(scores, right):.3f} | {calibration_error(scores, right):.3f}"
        lines.append(f"| {name} | {shown} | {errors} |")
    return "\n".join(lines)


def draw_reliability(kinds: Found, pairs: Found, names: list[str], path: Path) -> None:
    """Share of right boxes against the score, for the named scores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 5.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="perfectly calibrated")
    markers = itertools.cycle("osd^v")
    for name, color in zip(names, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False):
        judged = [found.judged(SCORES[name]) for found in (kinds, pairs)]
        scores, right = (np.concatenate(parts) for parts in zip(*judged, strict=True))
        points = reliability(scores, right)
        axes.plot(
            [score for score, _, _ in points], [share for _, share, _ in points],
            marker=next(markers), color=color, label=name,
        )  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="mean score of the boxes in a bin",
             ylabel="share of them that are right (IoU 0.5)")  # fmt: skip
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="checkpoint to measure")
    parser.add_argument("--dtype", default="float32", help="bfloat16 or float32")
    parser.add_argument("--seed", type=int, default=2026, help="held-out seed")
    parser.add_argument("--count", type=int, default=500, help="scenes")
    parser.add_argument("--image", type=Path, help="also draw the reliability curve here (PNG)")
    args = parser.parse_args()
    pipeline = from_pretrained(args.model, dtype=args.dtype)
    scenes = held_out_scenes(args.seed, args.count)
    images = [render(scene, IMAGE_SIZE) for scene in scenes]
    kinds = find_kinds(pipeline, scenes, images)
    pairs = find_pairs(pipeline, scenes, images)
    print(table(kinds, pairs))
    scores, right = kinds.judged(constant)
    print(f"\n{args.count} scenes of seed {args.seed}, {args.dtype}; for one kind, {scores.size} "
          f"boxes, of which {right.mean():.1%} are right")  # fmt: skip
    if args.image:
        names = ["product of locations", "geometric mean of near mass", "objectness x label",
                 "objectness x label x edges"]  # fmt: skip
        draw_reliability(kinds, pairs, names, args.image)


if __name__ == "__main__":
    main()
