"""Runs a model over a benchmark and scores it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from paligemma_jax.answering.generation import Generation
from paligemma_jax.errors import CheckpointError, InvalidImageError
from paligemma_jax.evaluation.benchmarks.benchmark import Answer, Benchmark
from paligemma_jax.evaluation.benchmarks.objects import found_boxes, found_mask
from paligemma_jax.evaluation.benchmarks.predictions import Prediction, PredictionFile
from paligemma_jax.evaluation.benchmarks.records import Example
from paligemma_jax.evaluation.metrics.accumulator import Accumulator
from paligemma_jax.evaluation.metrics.bootstrap import Interval, bootstrap
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing.image_source import load_image
from paligemma_jax.processing.prompts import split_labels

_BATCHES_A_SAVE = 4
Progress = Callable[[int], None]  # questions done since the last call


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The outcome of a benchmark.

    `figures` is every figure with its interval, in the metric's unit; `counts` the numbers of
    examples: num, left_out, and of each group.
    """

    benchmark: Benchmark
    examples: Sequence[Example]
    predictions: dict[str | int, Prediction]
    metric: Accumulator
    figures: dict[str, Interval]
    counts: dict[str, float]

    @property
    def main(self) -> Interval:
        """The published figure, in the unit of the tables."""
        scale, found = self.benchmark.scale, self.figures[self.benchmark.measured.main]
        return Interval(found.value * scale, found.low * scale, found.high * scale)


def evaluate(
    pipeline: Pipeline,
    benchmark: Benchmark,
    examples: Sequence[Example],
    *,
    out: Path | None = None,
    model: str = "",
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    beams: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress = lambda count: None,
) -> Evaluation:
    """Asks every question and scores the answers.

    Answers are kept in predictions.jsonl of the folder `out`, if it is given, and those that are
    there already are not asked again. A question whose picture cannot be read is left out, counted
    and named. `max_new_tokens` and `beams` are the benchmark's if not given; `model` names the
    checkpoint in run.json.

    Raises ConfigError for a folder with predictions of other settings, CheckpointError for masks
    without a codec, DatasetError if no question could be asked.
    """
    if benchmark.answer is Answer.MASK and pipeline.mask_codec is None:
        raise CheckpointError(
            "The checkpoint has no mask codec, which turns <seg> tokens into masks. The published "
            "vae-oid.npz fits every PaliGemma. Load with it: --mask-codec vae-oid.npz"
        )
    limits = max_new_tokens or benchmark.max_new_tokens, beams or benchmark.beams
    done: dict[str | int, Prediction] = {}
    file = None
    if out is not None:
        file = PredictionFile(out, _settings(benchmark, examples, model, *limits))
        done = dict(file.done)
    wanted = [example for example in examples if example.id not in done]
    progress(len(examples) - len(wanted))
    step = batch_size * _BATCHES_A_SAVE
    for start in range(0, len(wanted), step):
        part = wanted[start : start + step]
        new = _predict(pipeline, benchmark, part, batch_size, *limits)
        if file is not None:
            file.append(new)
        done |= {one.id: one for one in new}
        progress(len(part))
    metric = _score(pipeline, benchmark, examples, done)
    intervals = bootstrap(metric, resamples=resamples, seed=seed)
    counts = {k: v for k, v in metric.result().items() if k not in intervals}
    return Evaluation(benchmark, examples, done, metric, intervals, counts)


def _predict(
    pipeline: Pipeline,
    benchmark: Benchmark,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int,
    beams: int,
) -> list[Prediction]:
    pictures: list[list[Image.Image]] = []
    readable: list[Example] = []
    predictions: list[Prediction] = []
    for example in examples:
        try:
            pictures.append([load_image(path) for path in example.images])
            readable.append(example)
        except InvalidImageError as e:
            predictions.append(Prediction(example.id, error=str(e)))
    if not readable:
        return predictions
    prompts = [example.prompt for example in readable]
    limits: Any = dict(max_new_tokens=max_new_tokens, batch_size=batch_size)
    if benchmark.answer is Answer.BOXES:
        labels = [split_labels(example.row["labels"]) for example in readable]
        for example, found in zip(
            readable,
            pipeline.detect_batch([row[0] for row in pictures], labels, **limits),
            strict=True,
        ):
            objects = tuple(
                {"label": one.label, "box": list(one.xyxy), "score": one.score} for one in found
            )
            predictions.append(Prediction(example.id, found.text, objects=objects))
    elif beams > 1:
        answers = pipeline.beam_search(pictures, prompts, beams=beams, **limits)
        for example, best in zip(readable, answers, strict=True):
            predictions.append(Prediction(example.id, best[0].text if best else ""))
    else:
        for example, answer in zip(
            readable, pipeline.generate(pictures, prompts, **limits), strict=True
        ):
            predictions.append(_of(example, answer))
    return predictions


def _of(example: Example, answer: Generation) -> Prediction:
    return Prediction(example.id, answer.text, answer.logprob, len(answer.tokens))


def _score(
    pipeline: Pipeline,
    benchmark: Benchmark,
    examples: Sequence[Example],
    predictions: dict[str | int, Prediction],
) -> Accumulator:
    metric = benchmark.measured.make()
    for example in examples:
        made = predictions[example.id]
        if made.error is not None:
            metric.leave_out(example.id, made.error)
            continue
        prediction: Any = made.text
        if benchmark.answer is Answer.BOXES:
            prediction = found_boxes(made.objects or ())
        elif benchmark.answer is Answer.MASK and pipeline.mask_codec is not None:
            prediction = found_mask(made.text, pipeline.mask_codec, *example.reference.mask.shape)
        metric.add(example.id, prediction, example.reference)
    return metric


def _settings(
    benchmark: Benchmark, examples: Sequence[Example], model: str, max_new_tokens: int, beams: int
) -> dict[str, Any]:
    asked = [(e.id, [path.name for path in e.images], e.prompt) for e in examples]
    return {
        "task": benchmark.name,
        "model": model,
        "max_new_tokens": max_new_tokens,
        "beams": beams,
        "questions": len(examples),
        "digest of questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
    }
