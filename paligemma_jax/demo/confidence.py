"""Which score tells right boxes from wrong ones: `python -m paligemma_jax.demo.confidence`.

Held-out scenes are asked for every kind of shape, there or not, and for two things at once. Each
definition of a score ranks the same boxes: mean average precision at two overlaps, the area under
the ROC curve of right against wrong boxes, and the expected calibration error (10 bins of equal
width; Guo et al., arXiv 1706.04599). A constant score keeps the order in which boxes were named.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np

from paligemma_jax.demo.evaluate_boxes import Found, find_kinds, find_pairs
from paligemma_jax.demo.render import render
from paligemma_jax.demo.splits import held_out_scenes
from paligemma_jax.evaluation.benchmarks.demo import PICTURE_SIZE
from paligemma_jax.pretrained import from_pretrained
from paligemma_jax.processing import confidence as c
from paligemma_jax.processing.confidence import ObjectEvidence, ProductOf, Score

BINS = 10


def constant(evidence: ObjectEvidence) -> float:
    """What every other implementation gives."""
    return 1.0


SCORES: dict[str, Score] = {
    "constant": constant,
    "product of locations": c.location_product,
    "geometric mean of locations": c.location_geometric,
    "minimum of locations": c.location_minimum,
    "product of near mass": c.near_product,
    "geometric mean of near mass": c.near_geometric,
    "minimum of near mass": c.near_minimum,
    "good fit": c.good_fit,
    "label": c.label_product,
    "first location against the end": c.box_start,
    "objectness": c.objectness,
    "objectness x label": ProductOf((c.objectness, c.label_product)),
    "objectness x good fit": ProductOf((c.objectness, c.good_fit)),
    "objectness x label x good fit": ProductOf((c.objectness, c.label_product, c.good_fit)),
    "objectness x label x mean fit": ProductOf((c.objectness, c.label_product, c.mean_fit)),
    "objectness x label x product of near mass": ProductOf(
        (c.objectness, c.label_product, c.near_product)
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
    for name, colour in zip(names, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False):
        judged = [found.judged(SCORES[name]) for found in (kinds, pairs)]
        scores, right = (np.concatenate(parts) for parts in zip(*judged, strict=True))
        points = reliability(scores, right)
        axes.plot(
            [score for score, _, _ in points], [share for _, share, _ in points],
            marker=next(markers), color=colour, label=name,
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
    parser.add_argument("--picture", type=Path, help="also draw the reliability curve here (PNG)")
    args = parser.parse_args()
    pipeline = from_pretrained(args.model, dtype=args.dtype)
    scenes = held_out_scenes(args.seed, args.count)
    pictures = [render(scene, PICTURE_SIZE) for scene in scenes]
    kinds = find_kinds(pipeline, scenes, pictures)
    pairs = find_pairs(pipeline, scenes, pictures)
    print(table(kinds, pairs))
    scores, right = kinds.judged(constant)
    print(f"\n{args.count} scenes of seed {args.seed}, {args.dtype}; for one kind, {scores.size} "
          f"boxes, of which {right.mean():.1%} are right")  # fmt: skip
    if args.picture:
        names = ["product of locations", "geometric mean of near mass", "objectness x label",
                 "objectness x label x mean fit"]  # fmt: skip
        draw_reliability(kinds, pairs, names, args.picture)


if __name__ == "__main__":
    main()
