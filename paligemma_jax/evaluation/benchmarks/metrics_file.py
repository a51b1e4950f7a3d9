"""metrics.json: every figure of a run with its interval and definition."""

import inspect
import json
from pathlib import Path
from typing import Any

from paligemma_jax.evaluation.benchmarks.benchmark import Answer
from paligemma_jax.evaluation.benchmarks.evaluate import Evaluation
from paligemma_jax.evaluation.benchmarks.predictions import write_whole
from paligemma_jax.evaluation.metrics.by_group import ByGroup
from paligemma_jax.evaluation.metrics.together import Together

METRICS = "metrics.json"


def as_dict(done: Evaluation, model: str = "") -> dict[str, Any]:
    """Ready for JSON; the bounds are those of 95 % confidence. NaN becomes null."""
    benchmark = done.benchmark
    main = done.main
    return {
        "task": benchmark.name,
        "model": model,
        "figure": benchmark.measured.main,
        "value": _plain(main.value),
        "low": _plain(main.low),
        "high": _plain(main.high),
        "published": dict(benchmark.published),
        "card": dict(benchmark.card),
        "figures": {
            name: {"value": _plain(f.value), "low": _plain(f.low), "high": _plain(f.high)}
            for name, f in done.figures.items()
        },
        "counts": {name: int(count) for name, count in done.counts.items()},
        "left_out": {str(id): reason for id, reason in done.metric.left_out.items()},
        "empty": _empty(done),
        "definition": definition(done),
        "notes": benchmark.notes,
    }


def definition(done: Evaluation) -> str:
    """The rule of the metric, in words."""
    metric = done.metric
    inner = metric
    if isinstance(metric, ByGroup):
        inner = metric.metric
    elif isinstance(metric, Together):
        inner = metric.metrics[0]
    return inspect.getdoc(type(inner)) or ""


def _empty(done: Evaluation) -> list[str | int]:
    """Questions answered with nothing; of boxes that is an answer like others."""
    boxes = (Answer.BOXES, Answer.MASKS)
    asked = [e.id for e in done.examples if (e.answer or done.benchmark.answer) not in boxes]
    made = [done.predictions[id] for id in asked]
    return [one.id for one in made if one.error is None and not one.text]


def write_metrics(done: Evaluation, folder: Path, model: str = "") -> Path:
    """Writes metrics.json and returns its path."""
    path = folder / METRICS
    write_whole(path, json.dumps(as_dict(done, model), indent=1, ensure_ascii=False) + "\n")
    return path


def _plain(value: float) -> float | None:
    return None if value != value else value
