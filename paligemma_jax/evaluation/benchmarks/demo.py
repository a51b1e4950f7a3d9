"""The demo world as a benchmark: the table of the demo model's card."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from paligemma_jax.demo.evaluate import GOALS, Result, evaluate, table
from paligemma_jax.evaluation.benchmarks.predictions import write_whole
from paligemma_jax.evaluation.metrics.bootstrap import Interval, bootstrap
from paligemma_jax.evaluation.metrics.exact_match import ExactMatch
from paligemma_jax.pipeline import Pipeline

NAME = "demo"
SEED, SCENES = 2026, 500  # of the card
_NO_SHARES = ("detection mAP at IoU 0.5", "  two labels in a prompt", "segmentation mean IoU")


@dataclasses.dataclass(frozen=True)
class DemoEvaluation:
    """The figures of the card by name; intervals of those that are shares of right answers."""

    results: dict[str, Result]
    intervals: dict[str, Interval]
    scenes: int
    seed: int

    def table(self) -> str:
        """As the card has it, in Markdown."""
        return table(self.results)


def evaluate_demo(
    pipeline: Pipeline, *, scenes: int = SCENES, seed: int = SEED, resamples: int = 1000
) -> DemoEvaluation:
    """Measures a model on `scenes` held-out scenes, as `python -m paligemma_jax.demo.evaluate`.

    Fewer scenes than the card's are the first of them.
    """
    results = evaluate(pipeline, seed, scenes)
    intervals = {
        name: _interval(result, resamples)
        for name, result in results.items()
        if name not in _NO_SHARES
    }
    return DemoEvaluation(results, intervals, scenes, seed)


def write_demo_metrics(done: DemoEvaluation, folder: Path, model: str) -> Path:
    """Writes metrics.json, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for name, result in done.results.items():
        figures[name.strip()] = {"value": result.value, "prompts": result.prompts}
        if name in done.intervals:
            interval = done.intervals[name]
            figures[name.strip()] |= {"low": interval.low, "high": interval.high}
        if name in GOALS:
            figures[name.strip()]["goal"] = GOALS[name]
    settings = {"task": NAME, "model": model, "scenes": done.scenes, "seed": done.seed}
    path = folder / "metrics.json"
    write_whole(path, json.dumps(settings | {"figures": figures}, indent=1) + "\n")
    return path


def _interval(result: Result, resamples: int) -> Interval:
    right = round(result.value * result.prompts)
    answers = ["right"] * right + ["wrong"] * (result.prompts - right)
    metric = ExactMatch().add_all(answers, ["right"] * result.prompts)
    return bootstrap(metric, resamples=resamples)["acc"]
