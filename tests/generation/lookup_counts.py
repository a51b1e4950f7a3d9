"""Counts how many tokens a pass through the decoder gives with prompt lookup, on the demo model.

    python -m tests.generation.lookup_counts [--scenes 32] [--time]

Held-out scenes, each asked for its boxes and masks of one and of several kinds of shape, for a
caption and for its words. Every answer is compared with that of `generate`. Counts are passes after
the prompt's; 1.00 is what decoding without guesses gives. With `--time`, milliseconds an answer at
batch 1, without and with lookup: the fewest of several runs.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import paligemma_jax as pg
from paligemma_jax.demo.render import render
from paligemma_jax.demo.scene import KINDS
from paligemma_jax.demo.splits import held_out_scenes
from paligemma_jax.generation.generate import generate
from paligemma_jax.generation.grammar import detection_grammar, segmentation_grammar
from paligemma_jax.generation.lookup import generate_by_lookup, object_kinds
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing import prompts

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
MAX_NEW_TOKENS = 128
ROWS = 16
GUESSES = [1, 2, 4, 8]
Question = tuple[np.ndarray, str, Any]  # picture, prompt, constraint


def ask_all(pali: Pipeline, count: int) -> dict[str, list[Question]]:
    """Questions by task; of objects, those that are there."""
    tokenizer = pali.processor.tokenizer
    asked: dict[str, list[Question]] = {}

    def add(task: str, picture: np.ndarray, prompt: str, constraint: Any = None) -> None:
        asked.setdefault(task, []).append((picture, prompt, constraint))

    for scene in held_out_scenes(count=count):
        picture = render(scene, 224)
        present = [kind for kind in KINDS if any(s.kind == kind for s in scene.shapes)]
        frequent = max(KINDS, key=[s.kind for s in scene.shapes].count)
        for name, labels in (("one kind", (frequent,)), ("all kinds", tuple(present))):
            if labels and frequent in present:
                prompt = prompts.detect(labels)
                add(f"detect {name}", picture, prompt, detection_grammar(tokenizer, labels))
                add(f"detect {name}, freely", picture, prompt)
        if frequent in present:
            grammar = segmentation_grammar(tokenizer, (frequent,))
            add("segment one kind", picture, prompts.segment((frequent,)), grammar)
        add("caption", picture, prompts.caption("en"))
        if scene.texts:
            add("ocr", picture, prompts.ocr())
    return asked


def answers(
    pali: Pipeline, questions: Sequence[Question], answer: Callable[..., list[Any]]
) -> list[Any]:
    """What `answer(model, batch, ...)` says to all of them, some rows at a time."""
    found = []
    for start in range(0, len(questions), ROWS):
        pictures, asked, constraints = zip(*questions[start : start + ROWS], strict=True)
        batch = pali.processor(list(pictures), list(asked))
        settings: dict[str, Any] = dict(max_new_tokens=MAX_NEW_TOKENS)
        if constraints[0] is not None:
            settings["constraint"] = list(constraints)
        found += answer(pali.model, batch, **settings)
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
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()
    pali = pg.from_pretrained(DEMO, dtype="float32")
    kinds = object_kinds(pali.processor.tokenizer)
    for task, questions in ask_all(pali, options.scenes).items():
        greedy = answers(pali, questions, generate)
        tokens = sum(len(row.tokens) - 1 for row in greedy)
        print(f"{task}: {len(questions)} answers, {tokens / len(questions):.1f} tokens on average")
        for name, alike in (("plain", ()), ("kinds", kinds)):
            counts = []
            for guesses in GUESSES:

                def look_up(*args: Any, g: int = guesses, k: Any = alike, **more: Any) -> list[Any]:
                    return generate_by_lookup(*args, **more, guesses=g, kinds=k)

                found = answers(pali, questions, look_up)
                differ = sum(a.tokens != b.tokens for a, b in zip(found, greedy, strict=True))
                passes = sum(row.passes - 1 for row in found)
                counts.append(f"{guesses}: {tokens / max(passes, 1):.2f}")
                if differ:
                    counts.append(f"({differ} answers differ)")
            print(f"  {name} tokens a pass, by guesses: {', '.join(counts)}", flush=True)
        if options.time:
            one = questions[:1]
            plain = fewest(lambda one=one: answers(pali, one, generate))

            def by_kinds(*args: Any, **more: Any) -> list[Any]:
                return generate_by_lookup(*args, **more, kinds=kinds)

            looked_up = fewest(lambda one=one, f=by_kinds: answers(pali, one, f))
            print(f"  batch 1: {plain:.1f} ms, with lookup {looked_up:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
