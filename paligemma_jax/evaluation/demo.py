"""The demo world as a benchmark: the table of the demo model's card.

Measures the demo model on held-out scenes: `python -m paligemma_jax.evaluation.demo`.

The figures of `paligemma eval --task demo`, in a table and nothing else. Scenes come from a seed
that no training run can reach. Every answer is generated greedily through the public pipeline from
a 224-pixel picture, and compared with the truth exactly.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

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
from paligemma_jax.evaluation.evaluate import Evaluation
from paligemma_jax.evaluation.evaluate import evaluate as run
from paligemma_jax.evaluation.examples import Example, MadePicture
from paligemma_jax.evaluation.metric import ByFigure, OfFigure
from paligemma_jax.evaluation.tasks import Answer, Benchmark, Measured, field, template
from paligemma_jax.loading import from_pretrained
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing import prompts

SEED, SCENES, BATCH_SIZE = 2026, 500, 64
PICTURE_SIZE = 224  # pixels; twice the model's, so that resizing is part of what is measured
_WORD_TOKENS, _SAME_TOKENS, _OBJECT_TOKENS = 40, 4, 64

ANSWERS, COUNTS, OCR, SAME = "answers", "counts", "ocr exact", "same or different"
ONE_LABEL, TWO_LABELS = "detection mAP at IoU 0.5", "two labels in a prompt"
MASKS = "segmentation mean IoU"
_QUESTIONS = {name: f"of these {name}" for name in ("colour", "where", "exists")}
_CAPTIONS = tuple(f"caption {language}" for language in ("en", "es", "de", "fr"))

# Shares that the model was to reach.
GOALS = {
    ANSWERS: 0.95, COUNTS: 0.95, OCR: 0.90, **dict.fromkeys(_CAPTIONS, 0.90),
    ONE_LABEL: 0.85, MASKS: 0.75, SAME: 0.95,
}  # fmt: skip
_CARD = {
    ANSWERS: 100.0, COUNTS: 99.8, OCR: 99.2, "caption en": 99.6, "caption es": 99.4,
    "caption de": 99.2, "caption fr": 99.4, ONE_LABEL: 98.9, TWO_LABELS: 64.8, MASKS: 78.9,
    SAME: 100.0,
}  # fmt: skip


class DemoScores(ByFigure):
    """The demo model's card: every figure in 0..1, each over its own questions.

    Words are compared exactly, and these figures are shares of right answers. Detection is the mean
    over kinds of shape of the all-point average precision at IoU 0.5, of boxes ranked by their
    scores, where every kind of every scene is asked for, there or not. Segmentation asks for one
    name a scene; found and true masks are paired, and what has no partner counts 0. Intervals draw
    whole scenes, with all that is asked about them.
    """

    def __init__(self) -> None:
        words = (ANSWERS, *_QUESTIONS.values(), COUNTS, OCR, *_CAPTIONS, SAME)
        boxes = AllPointPrecision(last_word=True)
        super().__init__(
            {name: (ExactMatch(), "acc") for name in words}
            | {ONE_LABEL: (boxes, "ap"), TWO_LABELS: (boxes, "ap"), MASKS: (MaskPairs(), "miou")}
        )


DEMO = Benchmark(
    "demo", "Demo world", "Drawn as it is asked about", example={}, prompt=template("{prompt}"),
    reference=field("answer"), measure=Measured(DemoScores, ANSWERS), max_new_tokens=_WORD_TOKENS,
    published={"demo": _CARD[ANSWERS]}, card=_CARD,
    notes=f"The card has {SCENES} scenes and pairs, answered in float32.",
)  # fmt: skip


def demo_examples(scenes: int = SCENES, seed: int = SEED) -> list[Example]:
    """All questions about so many held-out scenes and as many pairs; fewer are the first of them.

    Pictures are drawn when they are asked about. Scenes come from a seed that no training run can
    reach.
    """
    drawn = held_out_scenes(seed, scenes)
    pictures = [
        MadePicture(f"scene {i:04d}", functools.partial(_draw, scene))
        for i, scene in enumerate(drawn)
    ]
    # Kind by kind, so that what is answered together is alike.
    return [
        *_about_words(drawn, pictures, seed),
        *_about_pairs(seed, scenes),
        *_about_boxes(drawn, pictures, ONE_LABEL, lambda scene: [(kind,) for kind in KINDS]),
        *_about_boxes(drawn, pictures, TWO_LABELS, _two_names),
        *_about_masks(drawn, pictures, seed),
    ]


def demo_table(figures: Mapping[str, float], counts: Mapping[str, float]) -> str:
    """The card's table in Markdown, of figures in 0..1 and the numbers of prompts."""
    lines = ["| measure | reached | goal | prompts |", "|---|---|---|---|"]
    extra = sorted(name for name in figures if name not in GOALS)
    for name in (ANSWERS, *extra, *[name for name in GOALS if name != ANSWERS]):
        if name in figures:
            goal = f"{100 * GOALS[name]:.0f} %" if name in GOALS else ""
            shown = name if name in GOALS else f"  {name}"
            lines.append(f"| {shown} | {100 * figures[name]:.1f} % | {goal} | {counts[name]:.0f} |")
    return "\n".join(lines)


def table_of(done: Evaluation) -> str:
    """`demo_table` of a run."""
    values = {name: figure.value for name, figure in done.figures.items()}
    return demo_table(values, {name: done.counts[f"num/{name}"] for name in values})


def _draw(scene: Scene) -> np.ndarray:
    return render(scene, PICTURE_SIZE)


def _about_words(
    scenes: Sequence[Scene], pictures: Sequence[MadePicture], seed: int
) -> Iterator[Example]:
    for i, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        # A stream of its own for the questions, apart from the one that drew the scene.
        for n, one in enumerate(examples(scene, split_rng(seed + 1, HELD_OUT, i))):
            if one.task == "detect":
                continue
            own = {"count": COUNTS, "ocr": OCR} | _QUESTIONS
            name = own.get(one.task) or one.task.replace("_", " ")
            also = (ANSWERS,) if one.task in _QUESTIONS else ()
            right = OfFigure(name, one.answer, i, also)
            yield _example(f"{i:04d} {n} {one.task}", (picture,), one.prompt, right, _WORD_TOKENS)


def _about_pairs(seed: int, count: int) -> Iterator[Example]:
    for i, (first, second, same) in enumerate(held_out_pairs(seed, count)):
        pictures = tuple(
            MadePicture(f"pair {i:04d} {side}", functools.partial(_draw, scene))
            for side, scene in (("left", first), ("right", second))
        )
        right = OfFigure(SAME, "yes" if same else "no", i)
        yield _example(f"{i:04d} same", pictures, SAME_PROMPT, right, _SAME_TOKENS)


def _two_names(scene: Scene) -> list[tuple[str, ...]]:
    names = sorted({shape.name for shape in scene.shapes})[:2]
    return [tuple(names)] if len(names) == 2 else []


def _about_boxes(
    scenes: Sequence[Scene],
    pictures: Sequence[MadePicture],
    figure: str,
    asked: Callable[[Scene], Sequence[tuple[str, ...]]],
) -> Iterator[Example]:
    for i, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        for labels in asked(scene):
            shapes = [(one, s) for one in labels for s in scene.shapes if one in (s.name, s.kind)]
            corners = [[PICTURE_SIZE * s.box[k] for k in (1, 0, 3, 2)] for _, s in shapes]
            right = OfFigure(figure, TrueBoxes(corners, [label for label, _ in shapes]), i)
            yield _example(
                f"{i:04d} detect {' ; '.join(labels)}", (picture,), prompts.detect(labels), right,
                _OBJECT_TOKENS, Answer.BOXES, labels,
            )  # fmt: skip


def _about_masks(
    scenes: Sequence[Scene], pictures: Sequence[MadePicture], seed: int
) -> Iterator[Example]:
    """One of the names in the scene that at most two shapes have."""
    for i, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        names = sorted(shape.name for shape in scene.shapes)
        fitting = [name for name in dict.fromkeys(names) if names.count(name) <= MOST_MASKS]
        if not fitting:
            continue
        name = fitting[int(split_rng(seed + 2, HELD_OUT, i).integers(len(fitting)))]
        masks = [shape_mask(s, PICTURE_SIZE) for s in scene.shapes if s.name == name]
        yield _example(
            f"{i:04d} segment {name}", (picture,), prompts.segment([name]),
            OfFigure(MASKS, np.stack(masks), i), _OBJECT_TOKENS, Answer.MASKS, (name,),
        )  # fmt: skip


def _example(
    id: str, pictures: tuple[MadePicture, ...], prompt: str, right: OfFigure, tokens: int,
    answer: Answer = Answer.TEXT, labels: Sequence[str] = (),
) -> Example:  # fmt: skip
    return Example(id, pictures, prompt, right, {"labels": list(labels)}, answer, tokens)


@dataclasses.dataclass(frozen=True)
class Result:
    """Share right (or mean average precision), and over how many prompts."""

    value: float
    prompts: int


def evaluate(pipeline: Pipeline, seed: int, count: int) -> dict[str, Result]:
    """Every figure of the model card, over `count` held-out scenes and as many pairs."""
    done = run(pipeline, DEMO, demo_examples(count, seed), batch_size=BATCH_SIZE, resamples=1)
    return {
        name: Result(figure.value, int(done.counts[f"num/{name}"]))
        for name, figure in done.figures.items()
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="checkpoint to measure")
    parser.add_argument("--dtype", default="float32", help="bfloat16 or float32")
    parser.add_argument("--seed", type=int, default=SEED, help="held-out seed")
    parser.add_argument("--count", type=int, default=SCENES, help="scenes")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    began = time.monotonic()
    results = evaluate(from_pretrained(args.model, dtype=args.dtype), args.seed, args.count)
    values = {name: result.value for name, result in results.items()}
    print(demo_table(values, {name: result.prompts for name, result in results.items()}))
    print(
        f"\n{args.count} scenes of seed {args.seed}, {args.dtype}, {time.monotonic() - began:.0f} s"
    )
    if args.json:
        figures = {name: dataclasses.asdict(result) for name, result in results.items()}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
