"""Counts how many tokens a pass through the decoder gives with prompt lookup, on the demo model.

    python -m tests.generation.lookup_counts [--scenes 64] [--time]

Held-out scenes, each asked for its boxes and masks of one and of several kinds of shape, for a
caption and for its words. Every answer is compared with that of `generate`. Counts are passes after
the prompt's; 1.00 is what decoding without guesses gives.

    plain    looks through prompt and answer for equal tokens
    kinds    counts all locations as alike, and all mask codes
    pattern  looks through a pattern of the answer too (objects only)
    earlier  looks through the answers to the 16 questions of this task before it too

With `--time`, milliseconds of the first answer at batch 1, the fewest of several runs.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import paligemma_jax as pg
from paligemma_jax.demo.render import render
from paligemma_jax.demo.scene import KINDS, held_out_scenes
from paligemma_jax.generation.decode import generate
from paligemma_jax.generation.detection_grammar import detection_grammar, segmentation_grammar
from paligemma_jax.generation.prompt_lookup import (
    generate_by_lookup,
    object_kinds,
    object_reference,
)
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing import prompts

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
MAX_NEW_TOKENS = 128
ROWS = 16
GUESSES = [1, 2, 4, 8]
EARLIER = 16


@dataclasses.dataclass(frozen=True)
class Question:
    """About one picture."""

    picture: np.ndarray
    prompt: str
    constraint: Any = None
    pattern: Sequence[int] = ()


def ask_all(pali: Pipeline, count: int) -> dict[str, list[Question]]:
    """Questions by task; of objects, those that are there."""
    tokenizer = pali.processor.tokenizer
    asked: dict[str, list[Question]] = {}

    def add(task: str, *question: Any) -> None:
        asked.setdefault(task, []).append(Question(*question))

    for scene in held_out_scenes(count=count):
        picture = render(scene, 224)
        present = [kind for kind in KINDS if any(s.kind == kind for s in scene.shapes)]
        frequent = max(KINDS, key=[s.kind for s in scene.shapes].count)
        for name, labels in (("one kind", [frequent]), ("all kinds", present)):
            if present:
                grammar = detection_grammar(tokenizer, labels)
                pattern = object_reference(tokenizer, labels)
                add(f"detect {name}", picture, prompts.detect(labels), grammar, pattern)
        if present:
            grammar = segmentation_grammar(tokenizer, [frequent])
            pattern = object_reference(tokenizer, [frequent], masks=True)
            add("segment one kind", picture, prompts.segment([frequent]), grammar, pattern)
        add("caption", picture, prompts.caption("en"))
        if scene.texts:
            add("ocr", picture, prompts.ocr())
    return asked


def answers(
    pali: Pipeline,
    questions: Sequence[Question],
    answer: Callable[..., list[Any]],
    references: Sequence[Sequence[int]] = (),
    **settings: Any,
) -> list[Any]:
    """What `answer(model, batch, ...)` says to all of them, some rows at a time."""
    found = []
    for start in range(0, len(questions), ROWS):
        some = questions[start : start + ROWS]
        batch = pali.processor([q.picture for q in some], [q.prompt for q in some])
        more: dict[str, Any] = {**settings, "max_new_tokens": MAX_NEW_TOKENS}
        if some[0].constraint is not None:
            more["constraint"] = [q.constraint for q in some]
        if references:
            more["references"] = references[start : start + ROWS]
        found += answer(pali.model, batch, **more)
    return found


def fewest(function: Callable[[], Any], repeats: int = 15) -> float:
    """Milliseconds."""
    function()  # compiles
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()
    pali = pg.from_pretrained(DEMO, dtype="float32")
    alike = {"kinds": object_kinds(pali.processor.tokenizer)}
    for task, questions in ask_all(pali, options.scenes).items():
        greedy = answers(pali, questions, generate)
        tokens = sum(len(row.tokens) - 1 for row in greedy)
        print(f"{task}: {len(questions)} answers, {tokens / len(questions):.1f} tokens on average")
        earlier = [
            [token for row in greedy[max(0, i - EARLIER) : i] for token in row.tokens]
            for i in range(len(greedy))
        ]
        ways: dict[str, tuple[dict[str, Any], Sequence[Sequence[int]]]] = {
            "plain": ({}, ()),
            "kinds": (alike, ()),
            "pattern": (alike, [q.pattern for q in questions]),
            "earlier": (alike, earlier),
        }
        for name, (settings, references) in ways.items():
            counts = []
            for guesses in GUESSES:
                found = answers(
                    pali, questions, generate_by_lookup, references, **settings, guesses=guesses
                )
                differ = sum(a.tokens != b.tokens for a, b in zip(found, greedy, strict=True))
                passes = sum(row.passes - 1 for row in found)
                counts.append(f"{guesses}: {tokens / max(passes, 1):.2f}")
                if differ:
                    counts.append(f"({differ} answers differ)")
            print(f"  {name:8} tokens a pass, by guesses: {', '.join(counts)}", flush=True)
        if options.time:
            one = questions[:1]
            plain = fewest(lambda one=one: answers(pali, one, generate))
            print(f"  batch 1: {plain:.1f} ms", end="")
            for guesses in GUESSES:
                look_up = functools.partial(
                    answers, pali, one, generate_by_lookup, **alike, guesses=guesses
                )
                print(f", {guesses} guesses {fewest(look_up):.1f} ms", end="", flush=True)
            print()


if __name__ == "__main__":
    main()
