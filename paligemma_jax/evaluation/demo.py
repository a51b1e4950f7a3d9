"""The demo world as an evaluation task: the table of the demo model's card.

    python -m paligemma_jax.evaluation.demo

prints the scores of `paligemma eval --task demo` in a table. Scenes come from a seed that no
training run can reach. Every answer is generated greedily through the public pipeline from a
224-pixel image, and compared with the truth exactly.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from paligemma_jax.data.tasks import Task
from paligemma_jax.demo.render import render, shape_mask
from paligemma_jax.demo.scene import (
    HELD_OUT,
    KINDS,
    Scene,
    held_out_pairs,
    held_out_scenes,
    split_rng,
)
from paligemma_jax.demo.tasks import MOST_MASKS, SAME_PROMPT, examples
from paligemma_jax.evaluation.answer_metrics import ExactMatch
from paligemma_jax.evaluation.detection_metrics import AllPointPrecision, MaskPairs, TrueBoxes
from paligemma_jax.evaluation.evaluate import EvaluationResult, evaluate
from paligemma_jax.evaluation.examples import Example, LazyImage
from paligemma_jax.evaluation.metric import Measure, Metric
from paligemma_jax.evaluation.tasks import EvaluationTask
from paligemma_jax.loading import from_pretrained
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing import prompts

SEED, SCENES, BATCH_SIZE = 2026, 500, 64
IMAGE_SIZE = 224  # pixels; twice the model's, so that resizing is part of what is measured
_TEXT_TOKENS, _SAME_TOKENS, _OBJECT_TOKENS = 40, 4, 64

ANSWERS, COUNTS, OCR, SAME = "answers", "counts", "ocr exact", "same or different"
ONE_LABEL, TWO_LABELS = "detection mAP at IoU 0.5", "two labels in a prompt"
MASKS = "segmentation mean IoU"
_CAPTIONS = tuple(f"caption {language}" for language in ("en", "es", "de", "fr"))

# Fractions that the model was to reach.
TARGETS = {
    ANSWERS: 0.95, COUNTS: 0.95, OCR: 0.90, **dict.fromkeys(_CAPTIONS, 0.90),
    ONE_LABEL: 0.85, MASKS: 0.75, SAME: 0.95,
}  # fmt: skip
_CARD = {
    ANSWERS: 100.0, COUNTS: 99.8, OCR: 99.2, "caption en": 99.6, "caption es": 99.4,
    "caption de": 99.2, "caption fr": 99.4, ONE_LABEL: 98.9, TWO_LABELS: 64.8, MASKS: 78.9,
    SAME: 100.0,
}  # fmt: skip


@dataclasses.dataclass(eq=False)
class DemoScores(Metric):
    """The demo model's card: every score in 0..1, each over its own group of examples.

    Words are compared exactly, and these scores are fractions of right answers. Detection is the
    mean over kinds of shape of the all-point average precision at IoU 0.5, of boxes ranked by their
    scores, where every kind of every scene is asked for, there or not. Segmentation asks for one
    name a scene; found and true masks are paired, and what has no partner counts 0. Intervals draw
    whole scenes, with all that is asked about them.
    """

    overall: bool = False
    expected = "an answer, FoundBoxes or masks, and the right ones"

    def _keep(self, prediction: Any, reference: Any) -> tuple[str, Any]:
        name = next(
            (n for n, (kind, _, _) in _RULES.items() if isinstance(reference, kind)), "text"
        )
        return name, _RULES[name][1]._keep(prediction, reference)

    def _measure(self, kept: Sequence[tuple[str, Any]]) -> Measure:
        _, metric, score = _RULES[kept[0][0]]
        measure = metric._measure([one for _, one in kept])
        return lambda weights: {"": measure(weights)[score]}  # called by its group

    def _example_scores(self, kept: Sequence[tuple[str, Any]]) -> np.ndarray:
        return _RULES[kept[0][0]][1]._example_scores([one for _, one in kept])


# By the type of the reference, which is the same in all of a group: the metric and its score.
_RULES: dict[str, tuple[type, Metric, str]] = {
    "text": (str, ExactMatch(), "acc"),
    "boxes": (TrueBoxes, AllPointPrecision(last_word=True), "ap"),
    "masks": (np.ndarray, MaskPairs(), "miou"),
}

DEMO = EvaluationTask(
    Task("demo", "Demo world", "Drawn as it is asked about"), DemoScores, ANSWERS,
    max_new_tokens=_TEXT_TOKENS, published={"demo": _CARD[ANSWERS]}, model_card=_CARD,
    notes=f"The model card has {SCENES} scenes and pairs, answered in float32.",
)  # fmt: skip


def demo_examples(scenes: int = SCENES, seed: int = SEED) -> list[Example]:
    """All questions about so many held-out scenes and as many pairs; fewer are the first of them.

    Images are drawn when they are asked about. Scenes come from a seed that no training run can
    reach.
    """
    drawn = [
        (scene, _image(f"scene {i:04d}", scene))
        for i, scene in enumerate(held_out_scenes(seed, scenes))
    ]
    # Kind by kind, so that what is answered together is alike.
    return [
        *_about_words(drawn, seed),
        *_about_pairs(seed, scenes),
        *_about_boxes(drawn, ONE_LABEL, lambda scene: [(kind,) for kind in KINDS]),
        *_about_boxes(drawn, TWO_LABELS, _two_names),
        *_about_masks(drawn, seed),
    ]


def evaluate_demo(pipeline: Pipeline, scenes: int = SCENES, seed: int = SEED) -> EvaluationResult:
    """Every score of the model card, over so many held-out scenes and as many pairs."""
    return evaluate(pipeline, DEMO, demo_examples(scenes, seed), batch_size=BATCH_SIZE, resamples=1)


def demo_table(done: EvaluationResult) -> str:
    """The model card's table in Markdown."""
    lines = ["| measure | reached | target | prompts |", "|---|---|---|---|"]
    extra = sorted(name for name in done.scores if name not in TARGETS)
    for name in (ANSWERS, *extra, *[name for name in TARGETS if name != ANSWERS]):
        if name in done.scores:
            target = f"{100 * TARGETS[name]:.0f} %" if name in TARGETS else ""
            shown = name if name in TARGETS else f"  {name}"
            value, count = 100 * done.scores[name].value, done.counts[f"num/{name}"]
            lines.append(f"| {shown} | {value:.1f} % | {target} | {count:.0f} |")
    return "\n".join(lines)


_Drawn = tuple[Scene, LazyImage]


def _image(name: str, scene: Scene) -> LazyImage:
    return LazyImage(name, functools.partial(render, scene, IMAGE_SIZE))


def _about_words(drawn: Sequence[_Drawn], seed: int) -> Iterator[Example]:
    for i, (scene, image) in enumerate(drawn):
        # A stream of its own for the questions, apart from the one that drew the scene.
        for n, one in enumerate(examples(scene, split_rng(seed + 1, HELD_OUT, i))):
            if one.task == "detect":
                continue
            groups = {"count": (COUNTS,), "ocr": (OCR,)}.get(one.task)
            if groups is None and one.task.startswith("caption"):
                groups = (one.task.replace("_", " "),)
            groups = groups or (f"of these {one.task}", ANSWERS)
            yield Example(
                f"{i:04d} {n} {one.task}", (image,), one.prompt, one.answer, {}, groups, i
            )


def _about_pairs(seed: int, count: int) -> Iterator[Example]:
    for i, (first, second, same) in enumerate(held_out_pairs(seed, count)):
        images = _image(f"pair {i:04d} left", first), _image(f"pair {i:04d} right", second)
        yield Example(
            f"{i:04d} same", images, SAME_PROMPT, "yes" if same else "no", {}, (SAME,), i,
            max_new_tokens=_SAME_TOKENS,
        )  # fmt: skip


def _two_names(scene: Scene) -> list[tuple[str, ...]]:
    names = sorted({shape.name for shape in scene.shapes})[:2]
    return [tuple(names)] if len(names) == 2 else []


def _about_boxes(
    drawn: Sequence[_Drawn], group: str, asked: Callable[[Scene], Sequence[tuple[str, ...]]]
) -> Iterator[Example]:
    for i, (scene, image) in enumerate(drawn):
        for labels in asked(scene):
            shapes = [(one, s) for one in labels for s in scene.shapes if one in (s.name, s.kind)]
            boxes = [[IMAGE_SIZE * s.box[k] for k in (1, 0, 3, 2)] for _, s in shapes]
            yield Example(
                f"{i:04d} detect {' ; '.join(labels)}", (image,), prompts.detect(labels),
                TrueBoxes(boxes, [label for label, _ in shapes]), {"labels": labels}, (group,), i,
                "boxes", _OBJECT_TOKENS,
            )  # fmt: skip


def _about_masks(drawn: Sequence[_Drawn], seed: int) -> Iterator[Example]:
    """One of the names in the scene that at most two shapes have."""
    for i, (scene, image) in enumerate(drawn):
        names = sorted(shape.name for shape in scene.shapes)
        usable = [name for name in dict.fromkeys(names) if names.count(name) <= MOST_MASKS]
        if not usable:
            continue
        name = usable[int(split_rng(seed + 2, HELD_OUT, i).integers(len(usable)))]
        masks = [shape_mask(s, IMAGE_SIZE) for s in scene.shapes if s.name == name]
        yield Example(
            f"{i:04d} segment {name}", (image,), prompts.segment([name]), np.stack(masks),
            {"labels": [name]}, (MASKS,), i, "masks", _OBJECT_TOKENS,
        )  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Measures the demo model on held-out scenes.")
    parser.add_argument("--model", default="demo", help="checkpoint to measure")
    parser.add_argument("--dtype", default="float32", help="bfloat16 or float32")
    parser.add_argument("--seed", type=int, default=SEED, help="held-out seed")
    parser.add_argument("--count", type=int, default=SCENES, help="scenes")
    args = parser.parse_args()
    began = time.monotonic()
    done = evaluate_demo(from_pretrained(args.model, dtype=args.dtype), args.count, args.seed)
    print(demo_table(done))
    took = time.monotonic() - began
    print(f"\n{args.count} scenes of seed {args.seed}, {args.dtype}, {took:.0f} s")


if __name__ == "__main__":
    main()
