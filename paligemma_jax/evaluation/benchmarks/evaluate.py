"""Runs a model over a benchmark and scores it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.evaluation.benchmarks.asking import Decoding, ask
from paligemma_jax.evaluation.benchmarks.benchmark import Answer, Benchmark
from paligemma_jax.evaluation.benchmarks.example import Example
from paligemma_jax.evaluation.benchmarks.objects import found_boxes, found_mask, found_masks
from paligemma_jax.evaluation.benchmarks.predictions import Prediction, PredictionFile
from paligemma_jax.evaluation.metrics.accumulator import Accumulator
from paligemma_jax.evaluation.metrics.bootstrap import Interval, bootstrap
from paligemma_jax.evaluation.metrics.by_group import Grouped
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.training.processes import barrier

_BATCHES_A_SAVE = 4
Progress = Callable[[int], None]  # questions done since the last call


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The outcome of a benchmark.

    `figures` is every figure with its interval, in the metric's unit; `counts` the numbers of
    examples: num, left_out, and of each group. `missing` is how many questions other processes
    have still to answer: the figures are then those of this process's share alone, and `metric`
    can be merged with theirs.
    """

    benchmark: Benchmark
    examples: Sequence[Example]
    predictions: dict[str | int, Prediction]
    metric: Accumulator
    figures: dict[str, Interval]
    counts: dict[str, float]
    missing: int = 0

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
    settings: Mapping[str, Any] | None = None,
    share: tuple[int, int] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress = lambda count: None,
) -> Evaluation:
    """Asks every question and scores the answers.

    Answers are kept in predictions.jsonl of the folder `out`, if it is given, and those that are
    there already are not asked again. A question whose picture cannot be read is left out, counted
    and named.

    Args:
      pipeline: the model; for all devices see `paligemma_jax.generation.devices`.
      benchmark, examples: what is asked.
      out: the folder; without, nothing is kept.
      model: names the checkpoint in run.json, and `settings` what else answers depend on.
      batch_size: questions that are answered together.
      max_new_tokens, beams: the benchmark's if not given.
      share: (1, 4) asks the second quarter of the questions. Processes that are given one `out`
        each keep a file of their own there; the last one to be ready has all figures, and so has
        whoever evaluates once more. That of the JAX process if not given.
      resamples, seed: of the intervals, as `bootstrap` takes them.
      progress: told how many questions are done since the last call.

    Raises ConfigError for a share that is none and a folder with predictions of other settings,
    CheckpointError for masks without a codec, DatasetError if no question could be asked.
    """
    masks = (Answer.MASK, Answer.MASKS)
    if pipeline.mask_codec is None and any(_kind(benchmark, e) in masks for e in examples):
        raise CheckpointError(
            "The checkpoint has no mask codec, which turns <seg> tokens into masks. The published "
            "vae-oid.npz fits every PaliGemma. Load with it: --mask-codec vae-oid.npz"
        )
    share = share or (jax.process_index(), jax.process_count())
    own = examples[_part(share)]
    decoding = Decoding(
        batch_size, max_new_tokens or benchmark.max_new_tokens, beams or benchmark.beams
    )
    done: dict[str | int, Prediction] = {}
    file = None
    if out is not None:
        kept = _settings(benchmark, examples, decoding) | {"model": model, **(settings or {})}
        file = PredictionFile(out, kept, share)
        done = dict(file.done)
    wanted = [example for example in own if example.id not in done]
    progress(len(own) - len(wanted))
    step = batch_size * _BATCHES_A_SAVE
    for start in range(0, len(wanted), step):
        part = wanted[start : start + step]
        new = ask(pipeline, benchmark, part, decoding)
        if file is not None:
            file.append(new)
        done |= {one.id: one for one in new}
        progress(len(part))
    if file is not None:
        if share == (jax.process_index(), jax.process_count()):
            barrier("evaluated")
        file.read_again()
        done = dict(file.done)
    missing = sum(example.id not in done for example in examples)
    scored = own if missing else examples
    metric = _score(pipeline, benchmark, scored, done)
    intervals = bootstrap(metric, resamples=resamples, seed=seed)
    counts = {k: v for k, v in metric.result().items() if k not in intervals}
    return Evaluation(benchmark, scored, done, metric, intervals, counts, missing)


def _part(share: tuple[int, int]) -> slice:
    number, count = share
    if not 0 <= number < count:
        raise ConfigError(
            f"The share {number} of {count} is none. From 0 up to {max(count, 1) - 1} of "
            f"{max(count, 1)} fits. Pass for example: share=(0, 2) (--process 0/2)"
        )
    return slice(number, None, count)


def _kind(benchmark: Benchmark, example: Example) -> Answer:
    return example.answer or benchmark.answer


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
        kind, codec = _kind(benchmark, example), pipeline.mask_codec
        if kind is Answer.BOXES:
            prediction = found_boxes(made.objects or ())
        elif kind is Answer.MASK and codec is not None:
            prediction = found_mask(made.text, codec, *example.reference.mask.shape)
        elif kind is Answer.MASKS and codec is not None:
            height, width = right_answer(example).shape[1:]
            prediction = found_masks(made.text, codec, height, width)
        metric.add(example.id, prediction, example.reference)
    return metric


def right_answer(example: Example) -> Any:
    """The reference, without the group that it is of."""
    reference = example.reference
    return reference.reference if isinstance(reference, Grouped) else reference


def _settings(
    benchmark: Benchmark, examples: Sequence[Example], decoding: Decoding
) -> dict[str, Any]:
    asked = [(e.id, [picture.name for picture in e.images], e.prompt) for e in examples]
    return {
        "task": benchmark.name,
        "max_new_tokens": decoding.max_new_tokens,
        "beams": decoding.beams,
        "questions": len(examples),
        "digest of questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
    }
