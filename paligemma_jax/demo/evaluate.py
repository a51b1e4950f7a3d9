"""Measures the demo model on held-out scenes: `python -m paligemma_jax.demo.evaluate`.

Scenes come from a seed that no training run can reach. Every answer is generated greedily through
the public pipeline from a 224-pixel picture, and compared with the truth exactly.
"""

import argparse
import collections
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paligemma_jax.demo.evaluate_boxes import find_kinds, find_pairs
from paligemma_jax.demo.evaluate_masks import segment_all
from paligemma_jax.demo.render import render
from paligemma_jax.demo.splits import HELD_OUT, held_out_pairs, held_out_scenes, split_rng
from paligemma_jax.demo.tasks import SAME_PROMPT, Example, examples
from paligemma_jax.pipeline import Generation, Pipeline
from paligemma_jax.pretrained import from_pretrained
from paligemma_jax.processing.confidence import box_score
from paligemma_jax.processing.processor import Entry

PICTURE_SIZE = 224  # pixels; twice the model's, so that resizing is part of what is measured
_QUESTIONS = ("colour", "where", "exists")
GOALS = {
    "answers": 0.95,
    "counts": 0.95,
    "ocr exact": 0.90,
    "caption en": 0.90,
    "caption es": 0.90,
    "caption de": 0.90,
    "caption fr": 0.90,
    "detection mAP at IoU 0.5": 0.85,
    "segmentation mean IoU": 0.75,
    "same or different": 0.95,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """Share right (or mean average precision), and over how many prompts."""

    value: float
    prompts: int


def evaluate(pipeline: Pipeline, seed: int, count: int) -> dict[str, Result]:
    """Every figure of the model card, over `count` held-out scenes and as many pairs."""
    scenes = held_out_scenes(seed, count)
    pictures = [render(scene, PICTURE_SIZE) for scene in scenes]
    asked: list[tuple[int, Example]] = []
    for i, scene in enumerate(scenes):
        # A stream of its own for the questions, apart from the one that drew the scene.
        rng = split_rng(seed + 1, HELD_OUT, i)
        asked += [(i, example) for example in examples(scene, rng) if example.task != "detect"]
    answers = _ask(pipeline, [(pictures[i], example.prompt) for i, example in asked], 40)
    right: dict[str, list[bool]] = collections.defaultdict(list)
    for (_, example), answer in zip(asked, answers, strict=True):
        right[_row(example)].append(answer.text == example.answer)
        if example.task in _QUESTIONS:
            right["answers"].append(answer.text == example.answer)

    pairs = held_out_pairs(seed, count)
    both = [[render(a, PICTURE_SIZE), render(b, PICTURE_SIZE)] for a, b, _ in pairs]
    for (_, _, same), answer in zip(
        pairs, _ask(pipeline, [(pair, SAME_PROMPT) for pair in both], 4), strict=True
    ):
        right["same or different"].append(answer.text == ("yes" if same else "no"))

    results = {name: Result(float(np.mean(v)), len(v)) for name, v in right.items()}
    found = find_kinds(pipeline, scenes, pictures)
    results["detection mAP at IoU 0.5"] = Result(found.precision(box_score), len(found.prompts))
    two = find_pairs(pipeline, scenes, pictures)
    results["  two labels in a prompt"] = Result(two.precision(box_score), len(two.prompts))
    results["segmentation mean IoU"] = Result(*segment_all(pipeline, scenes, pictures, seed))
    return results


def _row(example: Example) -> str:
    if example.task.startswith("caption_"):
        return example.task.replace("_", " ")
    return {"count": "counts", "ocr": "ocr exact"}.get(example.task, f"  of these {example.task}")


def _ask(
    pipeline: Pipeline, questions: Sequence[tuple[Entry, str]], max_new_tokens: int
) -> list[Generation]:
    return pipeline.generate(
        [picture for picture, _ in questions],
        [prompt for _, prompt in questions],
        max_new_tokens=max_new_tokens,
        batch_size=64,
    )


def table(results: dict[str, Result]) -> str:
    """The card's table, in Markdown."""
    lines = ["| measure | reached | goal | prompts |", "|---|---|---|---|"]
    extra = [name for name in results if name not in GOALS]
    order = ["answers", *sorted(extra), *[name for name in GOALS if name != "answers"]]
    for name in order:
        goal = f"{100 * GOALS[name]:.0f} %" if name in GOALS else ""
        result = results[name]
        lines.append(f"| {name} | {100 * result.value:.1f} % | {goal} | {result.prompts} |")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="checkpoint to measure")
    parser.add_argument("--dtype", default="float32", help="bfloat16 or float32")
    parser.add_argument("--seed", type=int, default=2026, help="held-out seed")
    parser.add_argument("--count", type=int, default=500, help="scenes")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    began = time.monotonic()
    results = evaluate(from_pretrained(args.model, dtype=args.dtype), args.seed, args.count)
    print(table(results))
    print(
        f"\n{args.count} scenes of seed {args.seed}, {args.dtype}, {time.monotonic() - began:.0f} s"
    )
    if args.json:
        figures = {name: dataclasses.asdict(result) for name, result in results.items()}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
