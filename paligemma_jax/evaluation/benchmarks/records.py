"""The questions of a benchmark, checked before a model is asked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.errors import DatasetError, InvalidImageError, InvalidPromptError
from paligemma_jax.evaluation.benchmarks.benchmark import Answer, Benchmark, Row
from paligemma_jax.evaluation.benchmarks.example import Example, Picture, open_picture
from paligemma_jax.evaluation.benchmarks.fields import Prompt, template
from paligemma_jax.evaluation.benchmarks.objects import found_boxes, true_mask
from paligemma_jax.evaluation.benchmarks.sources import Line, is_known_layout, read_lines
from paligemma_jax.evaluation.metrics.misfit import Misfit, refuse
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.prompts import split_labels


def expected_files(benchmark: Benchmark) -> str:
    """Which files are expected, and what is in them."""
    line = json.dumps(dict(benchmark.example), ensure_ascii=False)
    masks = " Masks are in the same folder." if benchmark.answer is Answer.MASK else ""
    coco = ", a COCO file or folder" if benchmark.answer is Answer.BOXES else ""
    return (
        f"A folder with {benchmark.name}.jsonl (or a .jsonl file of any name), one line a question "
        f"such as\n  {line}\nand with the pictures that the lines name beside it.{masks}\nLines "
        'of {"image", "prefix", "suffix"} fit too where they have all that the figures need, and '
        f"so do Roboflow's folders of them{coco}, and a version of a data set that tfds prepared "
        "as array_record, with columns of these names or of big_vision's builder."
    )


def read_examples(
    benchmark: Benchmark,
    data: str | Path,
    *,
    limit: int | None = None,
    prompt: str | None = None,
    split: str | None = None,
) -> list[Example]:
    """The questions of a file or folder (see `read_lines`); the first `limit` of them.

    `prompt` is a template such as "answer en {question}", instead of the benchmark's own. `split`
    is one of the folder's; test if not given, or else validation. Raises DatasetError that lists
    every row that does not fit, and says what is expected where the data is missing. Pictures are
    not opened, unless boxes are given as parts of them.
    """
    path = Path(data).expanduser()
    _check_there(benchmark, path)
    ask = template(prompt) if prompt is not None else None
    # The metric reads each reference before hours are spent on predictions.
    metric = benchmark.measured.make()
    examples: list[Example] = []
    problems: list[str] = []
    seen: dict[str | int, str] = {}
    for line in read_lines(benchmark, path, split):
        if limit is not None and len(examples) >= limit:
            break
        try:
            example = _example(benchmark, line, ask)
            metric._row(_any_prediction(benchmark), example.reference)
            if example.id in seen:
                raise Misfit(f"the id {example.id!r} is that of {seen[example.id]} too")
        except Misfit as e:
            problems.append(f"{line.place}: {e}")
            continue
        seen[example.id] = line.place
        examples.append(example)
    if problems or not examples:
        raise refuse(
            problems or [f"{path} has no lines"], expected_files(benchmark), "Mend these lines."
        )
    return examples


def _example(benchmark: Benchmark, line: Line, ask: Prompt | None) -> Example:
    if isinstance(line.row, Misfit):
        raise line.row
    row, whole_prompt = line.row, None
    if _is_training_row(benchmark, row):
        whole_prompt = row["prefix"]
        row = {"id": line.place} | dict(row)
    id = row.get("id")
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise Misfit(f"the id is {id!r}; a text or a whole number that no other line has fits")
    if isinstance(line.pictures, Misfit):
        raise line.pictures
    if whole_prompt is not None:
        row = _from_training(benchmark, row, line.pictures)
    if benchmark.answer is Answer.MASK:
        reference: Any = true_mask(row, line.folder)
    else:
        reference = benchmark.reference(row)
    if ask is not None:
        prompt = ask(row)
    elif whole_prompt is not None and benchmark.answer is Answer.TEXT:
        prompt = whole_prompt
    else:
        prompt = benchmark.prompt(row)
    return Example(id, line.pictures, prompt, reference, row)


def _is_training_row(benchmark: Benchmark, row: Row) -> bool:
    """Whether it has a prompt and an answer as one trains with, and not the benchmark's fields."""
    needed = benchmark.example.keys() - {"id", "image", "images"}
    return isinstance(row.get("prefix"), str) and "suffix" in row and not needed <= row.keys()


def _from_training(benchmark: Benchmark, row: Row, pictures: tuple[Picture, ...]) -> Row:
    """With the fields of the benchmark, as far as prefix and suffix tell them."""
    suffix = row["suffix"]
    answers = suffix if isinstance(suffix, list) else [suffix]
    if benchmark.answer is Answer.BOXES:
        told: Mapping[str, Any] = _objects(row["prefix"], suffix, pictures[0])
    else:
        first = answers[0] if answers else None
        told = {"answer": first, "text": first, "answers": answers, "captions": answers}
    return dict(told) | dict(row)


def _objects(prefix: str, suffix: Any, picture: Picture) -> dict[str, Any]:
    try:
        labels = split_labels(prefix.removeprefix("detect "))
    except InvalidPromptError as e:
        raise Misfit(f"the prefix does not fit: {e}") from e
    if not isinstance(suffix, str):
        raise Misfit(f"the suffix is {suffix!r} of type {type(suffix).__name__}, no string")
    try:
        width, height = open_picture(picture).size
    except InvalidImageError:  # will be left out
        return {"labels": list(labels), "objects": []}
    found = Detections.from_text(suffix, width, height)
    objects = [{"label": one.label, "box": list(one.xyxy)} for one in found]
    return {"labels": list(labels), "objects": objects}


def _any_prediction(benchmark: Benchmark) -> Any:
    return {Answer.TEXT: "", Answer.MASK: None, Answer.BOXES: found_boxes(())}[benchmark.answer]


def _check_there(benchmark: Benchmark, data: Path) -> None:
    own = data / f"{benchmark.name}.jsonl" if data.is_dir() else data
    if own.is_file() or data.is_dir() and is_known_layout(data):
        return
    there = sorted(child.name for child in data.iterdir())[:8] if data.is_dir() else []
    listing = f" (there: {', '.join(there)})" if there else ""
    raise DatasetError(
        f"{own} is not there{listing}. {expected_files(benchmark)}\nSee: paligemma eval --list"
    )
