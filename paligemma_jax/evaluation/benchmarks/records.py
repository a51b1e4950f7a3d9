"""The lines of a benchmark's data file, checked before a model is asked."""

import json
from pathlib import Path
from typing import Any

from paligemma_jax.data.image_folder import ImageFolder
from paligemma_jax.errors import DatasetError
from paligemma_jax.evaluation.benchmarks.benchmark import Answer, Benchmark
from paligemma_jax.evaluation.benchmarks.example import Example
from paligemma_jax.evaluation.benchmarks.fields import template
from paligemma_jax.evaluation.benchmarks.objects import found_boxes, true_mask
from paligemma_jax.evaluation.metrics.misfit import Misfit, refuse


def expected_files(benchmark: Benchmark) -> str:
    """Which files are expected, and what is in them."""
    line = json.dumps(dict(benchmark.example), ensure_ascii=False)
    masks = " Masks are in the same folder." if benchmark.answer is Answer.MASK else ""
    return (
        f"A folder with {benchmark.name}.jsonl (or a .jsonl file of any name), one line a question "
        f"such as\n  {line}\nand with the pictures that the lines name beside it.{masks}"
    )


def read_examples(
    benchmark: Benchmark, data: str | Path, *, limit: int | None = None, prompt: str | None = None
) -> list[Example]:
    """The questions of a file, or of the folder it is in; the first `limit` of them.

    `prompt` is a template such as "answer en {question}", instead of the benchmark's own. Raises
    DatasetError that lists every line that does not fit, and says what is expected where the file
    is missing. Pictures are not opened.
    """
    path = _find(benchmark, Path(data).expanduser())
    folder = ImageFolder(path.parent)
    ask = template(prompt) if prompt is not None else benchmark.prompt
    # The metric reads each reference before hours are spent on predictions.
    metric = benchmark.measured.make()
    examples: list[Example] = []
    problems: list[str] = []
    seen: dict[str | int, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if limit is not None and len(examples) >= limit:
            break
        if not line.strip():
            continue
        try:
            example = _example(benchmark, folder, line, ask)
            metric._row(_any_prediction(benchmark), example.reference)
            if example.id in seen:
                raise Misfit(f"the id {example.id!r} is that of line {seen[example.id]} too")
        except Misfit as e:
            problems.append(f"{path.name}:{number}: {e}")
            continue
        seen[example.id] = number
        examples.append(example)
    if problems or not examples:
        raise refuse(
            problems or [f"{path} has no lines"], expected_files(benchmark), "Mend these lines."
        )
    return examples


def _example(benchmark: Benchmark, folder: ImageFolder, line: str, ask: Any) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise Misfit(f"this is no JSON: {e}") from e
    if not isinstance(row, dict):
        raise Misfit(f"this is a {type(row).__name__}, no object with fields")
    id = row.get("id")
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise Misfit(f"the id is {id!r}; a text or a whole number that no other line has fits")
    names = row.get("images", [row["image"]] if "image" in row else None)
    if not isinstance(names, list) or not names:
        raise Misfit("neither 'image' (a name) nor 'images' (a list of names) is there")
    try:
        images = tuple(folder.path_of(name) for name in names)
    except DatasetError as e:
        raise Misfit(str(e)) from e
    if benchmark.answer is Answer.MASK:
        reference: Any = true_mask(row, folder.root)
    else:
        reference = benchmark.reference(row)
    return Example(id, images, ask(row), reference, row)


def _any_prediction(benchmark: Benchmark) -> Any:
    return {Answer.TEXT: "", Answer.MASK: None, Answer.BOXES: found_boxes(())}[benchmark.answer]


def _find(benchmark: Benchmark, data: Path) -> Path:
    path = data / f"{benchmark.name}.jsonl" if data.is_dir() else data
    if path.is_file():
        return path
    there = sorted(child.name for child in data.iterdir())[:8] if data.is_dir() else []
    listing = f" (there: {', '.join(there)})" if there else ""
    raise DatasetError(
        f"{path} is not there{listing}. {expected_files(benchmark)}\nSee: paligemma eval --list"
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DatasetError(
            f"{path} cannot be read: {e}. A text file in UTF-8 fits. Look with: file {path}"
        ) from e
