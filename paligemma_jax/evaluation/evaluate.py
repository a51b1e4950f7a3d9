"""Runs a model over a benchmark and scores it.

Predictions in a file that grows line by line, so that a run that stopped goes on.

Questions of a benchmark -> what a model answers.

metrics.json: every figure of a run with its interval and definition.

Predictions as the servers of VQAv2, DocVQA, VizWiz and GQA take them.
"""

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from paligemma_jax.errors import CheckpointError, ConfigError, DatasetError, InvalidImageError
from paligemma_jax.evaluation.examples import Example, Picture, open_picture
from paligemma_jax.evaluation.metric import (
    Accumulator,
    ByGroup,
    Grouped,
    Interval,
    Together,
    bootstrap,
)
from paligemma_jax.evaluation.tasks import Answer, Benchmark, found_boxes, found_mask, found_masks
from paligemma_jax.pipeline import Pipeline
from paligemma_jax.processing.prompts import split_labels
from paligemma_jax.training.distributed import barrier

PREDICTIONS, SETTINGS = "predictions.jsonl", "run.json"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model answered to one question.

    `logprob` is of all its tokens together (nats; None from beam search), `tokens` their number.
    `objects` are the boxes, where they were asked for: label, box (pixels) and score. `error` says
    why there is no answer.
    """

    id: str | int
    text: str = ""
    logprob: float | None = None
    tokens: int = 0
    objects: tuple[Mapping[str, Any], ...] | None = None
    error: str | None = None


class PredictionFile:
    """predictions.jsonl in a folder, with the settings that made it beside it in run.json.

    Processes that share a run write a file each, such as predictions.0-of-2.jsonl. Raises
    ConfigError where the folder has predictions of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], share: tuple[int, int] = (0, 1)):
        number, count = share
        own = PREDICTIONS if count == 1 else f"predictions.{number}-of-{count}.jsonl"
        self.path = folder / own
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / SETTINGS
        if kept.exists():
            _check_same(kept, settings)
        else:
            write_whole(kept, json.dumps(dict(settings), indent=1, ensure_ascii=False) + "\n")
        _cut_last_line(self.path)
        self.done: dict[str | int, Prediction] = {}
        self.read_again()

    def read_again(self) -> None:
        """Takes in what all processes have written by now."""
        for path in sorted(self.path.parent.glob("predictions*.jsonl")):
            self.done |= {one.id: one for one in _read(path)}

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Writes them so that they outlast the process."""
        new = list(predictions)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in new
            )
            file.flush()
            os.fsync(file.fileno())
        self.done |= {one.id: one for one in new}


def _cut_last_line(path: Path) -> None:
    """Takes off what was half written when the process ended."""
    if path.exists():
        lines = path.read_bytes().split(b"\n")
        if lines[-1]:
            write_whole(path, b"\n".join([*lines[:-1], b""]).decode())


def _read(path: Path) -> list[Prediction]:
    # Another process may be writing its last line.
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        rows = [json.loads(line) for line in lines if line]
        return [Prediction(**row | {"objects": _tuple(row["objects"])}) for row in rows]
    except (ValueError, TypeError, KeyError) as e:
        raise DatasetError(
            f"{path} holds a line that is no prediction: {e}. Lines that paligemma eval "
            "wrote fit. Remove the file, or choose another folder: --out FOLDER"
        ) from e


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is never there in part."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _tuple(values: Any) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _check_same(path: Path, settings: Mapping[str, Any]) -> None:
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
            f"{path.parent} holds predictions of other settings: {'; '.join(different)}. The same "
            "settings go on where it stopped. Choose another folder: --out FOLDER"
        )


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are made: questions at once, tokens at most, beams (1 is greedy)."""

    batch_size: int
    max_new_tokens: int
    beams: int


def ask(
    pipeline: Pipeline, benchmark: Benchmark, examples: Sequence[Example], decoding: Decoding
) -> list[Prediction]:
    """One prediction for each example, in any order.

    A picture that several questions share is read once, and encoded once where the questions are
    answered together. One that cannot be read gives predictions with an error.
    """
    opened: dict[Picture, Image.Image | InvalidImageError] = {}
    groups: dict[tuple[Answer, int], list[Example]] = {}
    predictions: list[Prediction] = []
    for example in examples:
        pictures = [_opened(picture, opened) for picture in example.images]
        errors = [one for one in pictures if isinstance(one, InvalidImageError)]
        if errors:
            predictions.append(Prediction(example.id, error=str(errors[0])))
            continue
        kind = example.answer or benchmark.answer
        limit = example.max_new_tokens or decoding.max_new_tokens
        groups.setdefault((kind, limit), []).append(example)
    for (kind, limit), group in groups.items():
        rows = [[_picture(opened[picture]) for picture in one.images] for one in group]
        limits: Any = dict(max_new_tokens=limit, batch_size=decoding.batch_size)
        if kind in (Answer.BOXES, Answer.MASKS):
            predictions += _objects(pipeline, kind, group, [row[0] for row in rows], limits)
        else:
            predictions += _words(pipeline, group, rows, limits, decoding.beams)
    return predictions


def _opened(
    picture: Picture, opened: dict[Picture, Image.Image | InvalidImageError]
) -> Image.Image | InvalidImageError:
    if picture not in opened:
        try:
            opened[picture] = open_picture(picture)
        except InvalidImageError as e:
            opened[picture] = e
    return opened[picture]


def _picture(opened: Image.Image | InvalidImageError) -> Image.Image:
    if isinstance(opened, InvalidImageError):
        raise opened
    return opened


def _words(
    pipeline: Pipeline, examples: Sequence[Example], pictures: Any, limits: Any, beams: int
) -> list[Prediction]:
    prompts = [example.prompt for example in examples]
    if beams > 1:
        answers = pipeline.beam_search(pictures, prompts, num_beams=beams, **limits)
        return [
            Prediction(example.id, best[0].text if best else "")
            for example, best in zip(examples, answers, strict=True)
        ]
    return [
        Prediction(example.id, answer.text, answer.logprob, len(answer.tokens))
        for example, answer in zip(
            examples, pipeline.generate(pictures, prompts, **limits), strict=True
        )
    ]


def _objects(
    pipeline: Pipeline, kind: Answer, examples: Sequence[Example], pictures: Any, limits: Any
) -> list[Prediction]:
    labels = [split_labels(example.row["labels"]) for example in examples]
    find = pipeline.detect_batch if kind is Answer.BOXES else pipeline.segment_batch
    return [
        Prediction(
            example.id,
            found.text,
            objects=tuple(
                {"label": one.label, "box": list(one.xyxy), "score": one.score} for one in found
            ),
        )
        for example, found in zip(examples, find(pictures, labels, **limits), strict=True)
    ]


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


# The keys of the question and of the answer; VizWiz's questions are named by their picture.
_KEYS = {
    "vqav2": ("question_id", "answer"),
    "textvqa": ("question_id", "answer"),
    "docvqa": ("questionId", "answer"),
    "infovqa": ("questionId", "answer"),
    "stvqa": ("question_id", "answer"),
    "vizwizvqa": ("image", "answer"),
    "gqa": ("questionId", "prediction"),
}


def server_rows(done: Evaluation) -> list[dict[str, Any]] | None:
    """One object a question in the order of the data; None for tasks without a server.

    Ids of VQAv2, TextVQA, DocVQA, InfographicVQA and ST-VQA that are digits become numbers. A
    question that was left out is answered with "".
    """
    keys = _KEYS.get(done.benchmark.name)
    if keys is None:
        return None
    question, answer = keys
    rows = []
    for example in done.examples:
        id: Any = example.images[0].name if question == "image" else example.id
        if isinstance(id, str) and id.isdecimal() and done.benchmark.name != "gqa":
            id = int(id)
        rows.append({question: id, answer: done.predictions[example.id].text})
    return rows


def write_server_file(done: Evaluation, folder: Path) -> Path | None:
    """Writes server.json, and returns its path; nothing for tasks without a server."""
    rows = server_rows(done)
    if rows is None:
        return None
    path = folder / "server.json"
    write_whole(path, json.dumps(rows, ensure_ascii=False) + "\n")
    return path
