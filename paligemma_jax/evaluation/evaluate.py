"""Runs a model over the examples of a task: predictions are kept in a file that grows line by line,
so that a run that stopped goes on; the scores, with their intervals, go into metrics.json.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from paligemma_jax.errors import CheckpointError, ConfigError, DatasetError, InvalidImageError
from paligemma_jax.evaluation.detection_metrics import FoundBoxes, ObjectMask
from paligemma_jax.evaluation.examples import Example, ImageRef, open_image
from paligemma_jax.evaluation.metric import Interval, Metric, bootstrap
from paligemma_jax.evaluation.tasks import EvaluationTask, Output
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing.detections import Segmentations
from paligemma_jax.processing.location_tokens import parse_answer
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.processing.prompts import split_labels
from paligemma_jax.training.distributed import barrier

PREDICTIONS, SETTINGS, METRICS = "predictions.jsonl", "run.json", "metrics.json"
SUBMISSION = "submission.json"
_BATCHES_PER_SAVE = 4


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model answered to one example.

    `logprob` is of all its tokens together (nats; None from beam search), `tokens` their number.
    `objects` are the boxes, where they were asked for: label, box (pixels) and score. `error` says
    why there is no answer.
    """

    id: str | int
    text: str = ""
    logprob: float | None = None
    tokens: int = 0
    objects: Sequence[Mapping[str, Any]] | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """The outcome of a task.

    `scores` is every score with its interval, in the metric's unit; `counts` the numbers of
    examples: num, skipped, and of each group. `missing` is how many examples other processes have
    still to answer: the scores are then those of this process's shard alone, and `metric` can be
    merged with theirs.
    """

    task: EvaluationTask
    examples: Sequence[Example]
    predictions: dict[str | int, Prediction]
    metric: Metric
    scores: dict[str, Interval]
    counts: dict[str, float]
    missing: int = 0

    @property
    def main(self) -> Interval:
        """The published score, in the unit of the tables."""
        scale, found = self.task.scale, self.scores[self.task.main]
        return Interval(found.value * scale, found.low * scale, found.high * scale)

    def output(self, example: Example) -> Output:
        """What the answer to an example is read as."""
        return example.output or self.task.output

    def to_dict(self, model: str = "") -> dict[str, Any]:
        """Ready for JSON; the bounds are those of 95 % confidence. NaN becomes null."""
        text = [e.id for e in self.examples if self.output(e) in ("text", "mask")]
        answered = [self.predictions[id] for id in text]
        return {
            "task": self.task.name,
            "model": model,
            "metric": self.task.main,
            **_interval(self.main),
            "published": dict(self.task.published),
            "model_card": dict(self.task.model_card),
            "scores": {name: _interval(score) for name, score in self.scores.items()},
            "counts": {name: int(count) for name, count in self.counts.items()},
            "skipped": {str(id): reason for id, reason in self.metric.skipped.items()},
            "empty": [one.id for one in answered if one.error is None and not one.text],
            "definition": self.metric.definition,
            "notes": self.task.notes,
        }


def _interval(score: Interval) -> dict[str, float | None]:
    bounds = dataclasses.asdict(score).items()
    return {name: None if value != value else value for name, value in bounds}


def evaluate(
    pipeline: Pipeline,
    task: EvaluationTask,
    examples: Sequence[Example],
    *,
    out: Path | None = None,
    model: str = "",
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
    settings: Mapping[str, Any] | None = None,
    shard: tuple[int, int] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], object] = lambda count: None,
) -> EvaluationResult:
    """Runs the model on every example and scores its answers.

    Answers are kept in predictions.jsonl of the folder `out`, if it is given, and those that are
    there already are not generated again. An example whose image cannot be read is skipped, counted
    and named.

    Args:
      pipeline: the model; for all devices see `paligemma_jax.generation.devices`.
      task, examples: what is asked.
      out: the folder; without, nothing is kept.
      model: names the checkpoint in run.json, and `settings` what else answers depend on.
      batch_size: examples that are answered together.
      max_new_tokens, num_beams: the task's if not given.
      shard: (1, 4) is the second quarter of the examples. Processes that are given one `out` each
        keep a file of their own there; the last one to finish has all scores, and so has whoever
        evaluates once more. That of the JAX process if not given.
      resamples, seed: of the intervals, as `bootstrap` takes them.
      progress: called with how many examples are done since the last call.

    Raises:
      ConfigError: for an invalid shard and a folder with predictions of other settings.
      CheckpointError: for masks without a codec.
      DatasetError: if no example could be answered.
    """
    outputs = {example.output or task.output for example in examples}
    if pipeline.mask_codec is None and outputs & {"mask", "masks"}:
        raise CheckpointError(
            "The checkpoint has no mask codec, which turns <seg> tokens into masks. The published "
            "vae-oid.npz serves every PaliGemma. Load with it: --mask-codec vae-oid.npz"
        )
    number, count = shard = shard or (jax.process_index(), jax.process_count())
    if not 0 <= number < count:
        raise ConfigError(f"expected a shard such as (0, 2) or (1, 2), got {shard}")
    own = examples[number::count]
    tokens, beams = max_new_tokens or task.max_new_tokens, num_beams or task.num_beams
    done: dict[str | int, Prediction] = {}
    file = None
    if out is not None:
        asked = [(e.id, [image.name for image in e.images], e.prompt) for e in examples]
        kept = {
            "task": task.name,
            "max_new_tokens": tokens,
            "num_beams": beams,
            "examples": len(examples),
            "checksum of examples": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
            "model": model,
            **(settings or {}),
        }
        file = PredictionFile(out, kept, shard)
        done = dict(file.done)
    wanted = [example for example in own if example.id not in done]
    progress(len(own) - len(wanted))
    step = batch_size * _BATCHES_PER_SAVE
    for start in range(0, len(wanted), step):
        part = wanted[start : start + step]
        new = _predict(pipeline, task, part, batch_size, tokens, beams)
        if file is not None:
            file.append(new)
        done |= {one.id: one for one in new}
        progress(len(part))
    if file is not None:
        if shard == (jax.process_index(), jax.process_count()):
            barrier("evaluated")
        file.read_again()
        done = dict(file.done)
    missing = sum(example.id not in done for example in examples)
    scored = own if missing else examples
    metric = task.metric()
    for example in scored:
        made = done[example.id]
        if made.error is not None:
            metric.skip(example.id, made.error)
            continue
        found = _found(made, example.output or task.output, example.reference, pipeline.mask_codec)
        group, unit = example.groups, example.unit
        metric.add(example.id, found, example.reference, group=group, unit=unit)
    intervals = bootstrap(metric, resamples=resamples, seed=seed)
    counts = {k: v for k, v in metric.result().items() if k not in intervals}
    return EvaluationResult(task, scored, done, metric, intervals, counts, missing)


def _predict(
    pipeline: Pipeline,
    task: EvaluationTask,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int,
    num_beams: int,
) -> list[Prediction]:
    """One prediction for each example, in any order.

    An image that several examples share is read once, and encoded once where they are answered
    together. One that cannot be read gives predictions with an error.
    """
    opened: dict[ImageRef, Image.Image] = {}
    groups: dict[tuple[Output, int], list[Example]] = {}
    predictions: list[Prediction] = []
    for example in examples:
        try:
            for image in example.images:
                if image not in opened:
                    opened[image] = open_image(image)
        except InvalidImageError as e:
            predictions.append(Prediction(example.id, error=str(e)))
            continue
        key = example.output or task.output, example.max_new_tokens or max_new_tokens
        groups.setdefault(key, []).append(example)
    for (output, limit), group in groups.items():
        images: Any = [[opened[image] for image in one.images] for one in group]
        options: Any = dict(max_new_tokens=limit, batch_size=batch_size)
        if output in ("boxes", "masks"):
            find = pipeline.detect_batch if output == "boxes" else pipeline.segment_batch
            labels = [split_labels(one.fields["labels"]) for one in group]
            results = find([first for first, *_ in images], labels, **options)
            predictions += [
                Prediction(example.id, found.text, objects=[
                    {"label": one.label, "box": list(one.xyxy), "score": one.score} for one in found
                ])
                for example, found in zip(group, results, strict=True)
            ]  # fmt: skip
            continue
        prompts = [example.prompt for example in group]
        if num_beams > 1:
            beams = pipeline.beam_search(images, prompts, num_beams=num_beams, **options)
            texts = [best[0].text if best else "" for best in beams]
            predictions += [Prediction(e.id, t) for e, t in zip(group, texts, strict=True)]
            continue
        answers = pipeline.generate(images, prompts, **options)
        predictions += [
            Prediction(example.id, answer.text, answer.logprob, len(answer.tokens))
            for example, answer in zip(group, answers, strict=True)
        ]
    return predictions


def _found(made: Prediction, output: Output, reference: Any, codec: MaskCodec | None) -> Any:
    """A prediction as the metric takes it."""
    if output == "boxes":
        objects = made.objects or ()
        return FoundBoxes(*([one[k] for one in objects] for k in ("box", "label", "score")))
    if output == "text" or codec is None:
        return made.text
    if output == "mask":
        return found_mask(made.text, codec, *reference.mask.shape)
    return found_masks(made.text, codec, *reference.shape[1:])


def found_mask(text: str, codec: MaskCodec, height: int, width: int) -> ObjectMask | None:
    """The first object with a mask in an answer, in an image of height x width pixels.

    As big_vision's evaluator: corners are cut to whole pixels, the decoded 64 x 64 crop is resized
    bilinearly and cut at half. None for an answer without a mask, or with a box without pixels.
    """
    box = next((one for one in parse_answer(text).objects if one.codes), None)
    if box is None:
        return None
    x1, x2 = int(box.x1 * width), int(box.x2 * width)
    y1, y2 = int(box.y1 * height), int(box.y2 * height)
    if x2 <= x1 or y2 <= y1:
        return None
    crop = codec.decode(np.array([box.codes]))[0]
    resized = Image.fromarray(crop).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = np.asarray(resized) > 0.5
    return ObjectMask(mask, (box.x1, box.y1, box.x2, box.y2))


def found_masks(text: str, codec: MaskCodec, height: int, width: int) -> np.ndarray:
    """bool[n, height, width] of all objects in an answer, empty for one with a box alone."""
    return Segmentations.decode(parse_answer(text), width, height, codec.decode).masks


class PredictionFile:
    """predictions.jsonl in a folder, with the settings that made it beside it in run.json.

    Processes that share a run write a file each, such as predictions.0-of-2.jsonl. Raises
    ConfigError where the folder has predictions of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], shard: tuple[int, int]):
        number, count = shard
        own = PREDICTIONS if count == 1 else f"predictions.{number}-of-{count}.jsonl"
        self.path = folder / own
        folder.mkdir(parents=True, exist_ok=True)
        self._check_same(folder / SETTINGS, settings)
        if self.path.exists():  # without what was half written when the process ended
            *whole, last = self.path.read_bytes().split(b"\n")
            if last:
                write_whole(self.path, b"\n".join([*whole, b""]).decode())
        self.done: dict[str | int, Prediction] = {}
        self.read_again()

    def _check_same(self, path: Path, settings: Mapping[str, Any]) -> None:
        if not path.exists():
            write_whole(path, json.dumps(dict(settings), indent=1, ensure_ascii=False) + "\n")
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = {}
        different = [
            f"{name} was {kept.get(name)!r} and is {settings.get(name)!r}"
            for name in sorted({*kept, *settings})
            if kept.get(name) != settings.get(name)
        ]
        if different:
            raise ConfigError(
                f"{path.parent} holds predictions of other settings: {'; '.join(different)}. With "
                "the same settings the run goes on. Choose another folder: --out FOLDER"
            )

    def read_again(self) -> None:
        """Takes in what all processes have written by now."""
        for path in sorted(self.path.parent.glob("predictions*.jsonl")):
            lines = path.read_bytes().split(b"\n")[:-1]  # the last may be half written
            try:
                for made in (Prediction(**json.loads(line)) for line in lines if line):
                    self.done[made.id] = made
            except (ValueError, TypeError, KeyError) as e:
                raise DatasetError(
                    f"{path} holds a line that is not a prediction: {e}. Choose another folder: "
                    "--out FOLDER"
                ) from e

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Writes them so that they outlast the process."""
        new = list(predictions)
        with self.path.open("a", encoding="utf-8") as file:
            for one in new:
                file.write(json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done |= {one.id: one for one in new}


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is never there in part."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_metrics(done: EvaluationResult, folder: Path, model: str = "") -> Path:
    """Writes metrics.json and returns its path."""
    path = folder / METRICS
    write_whole(path, json.dumps(done.to_dict(model), indent=1, ensure_ascii=False) + "\n")
    return path


# The keys of the question and of the answer; VizWiz's questions are named by their image.
_SUBMISSION_KEYS = {
    "vqav2": ("question_id", "answer"),
    "textvqa": ("question_id", "answer"),
    "docvqa": ("questionId", "answer"),
    "infovqa": ("questionId", "answer"),
    "stvqa": ("question_id", "answer"),
    "vizwizvqa": ("image", "answer"),
    "gqa": ("questionId", "prediction"),
}


def write_submission(done: EvaluationResult, folder: Path) -> Path | None:
    """Writes submission.json for the task's test server, and returns its path; None without one.

    One object an example in the order of the data. Ids that are digits become numbers, but for GQA.
    A skipped example is answered with "".
    """
    if done.task.name not in _SUBMISSION_KEYS:
        return None
    question, answer = _SUBMISSION_KEYS[done.task.name]
    objects = []
    for example in done.examples:
        id: Any = example.images[0].name if question == "image" else example.id
        if isinstance(id, str) and id.isdecimal() and done.task.name != "gqa":
            id = int(id)
        objects.append({question: id, answer: done.predictions[example.id].text})
    path = folder / SUBMISSION
    write_whole(path, json.dumps(objects, ensure_ascii=False) + "\n")
    return path
