"""metrics.json: every figure of a run with its interval and definition."""

import inspect
import json
from pathlib import Path
from typing import Any

from paligemma_jax.evaluation.benchmarks.evaluate import Evaluation
from paligemma_jax.evaluation.benchmarks.predictions import write_whole

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
        "empty": [p.id for p in done.predictions.values() if p.error is None and not p.text],
        "definition": definition(done),
        "notes": benchmark.notes,
    }


def definition(done: Evaluation) -> str:
    """The rule of the metric, in words."""
    metric: Any = done.metric
    inner = getattr(metric, "metric", None) or next(iter(getattr(metric, "metrics", ())), metric)
    return inspect.getdoc(type(inner)) or ""


def write_metrics(done: Evaluation, folder: Path, model: str = "") -> Path:
    """Writes metrics.json and returns its path."""
    path = folder / METRICS
    write_whole(path, json.dumps(as_dict(done, model), indent=1, ensure_ascii=False) + "\n")
    return path


def _plain(value: float) -> float | None:
    return None if value != value else value
