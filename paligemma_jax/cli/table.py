"""Questions and answers beside each other, wrapped to the terminal's width."""

import dataclasses
import itertools
import shutil
import textwrap
from collections.abc import Iterator, Sequence

NARROWEST, WIDEST = 72, 128


@dataclasses.dataclass(frozen=True)
class Row:
    """A question and its answer; the truth and whether the answer is right where that is known."""

    question: str
    answer: str
    truth: str | None = None
    right: bool | None = None


def render_table(rows: Sequence[Row], marks: str) -> Iterator[str]:
    """Lines of a table; `marks` are the letters for right and wrong."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, NARROWEST), WIDEST)
    known = any(row.truth is not None for row in rows)
    headings = ["question", "the model's answer", *(["the truth"] if known else [])]
    columns = [1, *[(width - 1) // len(headings) - 2] * len(headings)]
    yield _line(columns, ["", *headings])
    yield "-" * (sum(columns) + 2 * len(headings))
    for row in rows:
        mark = "" if row.right is None else marks[0] if row.right else marks[1]
        cells = [mark, row.question, row.answer or "(empty)"]
        if known:
            cells.append(row.truth or "(empty)")
        wrapped = [_wrap(cell, size) for cell, size in zip(cells, columns, strict=True)]
        for parts in itertools.zip_longest(*wrapped, fillvalue=""):
            yield _line(columns, parts)


def _wrap(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width)]


def _line(columns: Sequence[int], cells: Sequence[str]) -> str:
    padded = (f"{cell:{width}}" for cell, width in zip(cells, columns, strict=True))
    return "  ".join(padded).rstrip()
