"""A run as tables for people: aligned for a terminal, or in Markdown."""

import itertools
from collections.abc import Callable, Sequence

from paligemma_jax.benchmark.result import BenchmarkResult
from paligemma_jax.benchmark.summary import Row

Cells = list[str]
HEADINGS = [
    "case", "implementation", "median", "min", "spread", "per s", "GB/s", "TFLOP/s", "of floor",
    "peer", "ratio", "peak GB", "programs",
]  # fmt: skip
GOAL_HEADINGS = ["goal", "model", "wanted", "measured", "verdict"]
_HIDDEN = ("ceilings", "equality")  # said above the table


def as_text(result: BenchmarkResult) -> str:
    """For a terminal."""
    return "\n".join(_document(result, _aligned, lambda title: f"\n{title}"))


def as_markdown(result: BenchmarkResult) -> str:
    """For a file."""
    return "\n".join(_document(result, _piped, lambda title: f"\n### {title}\n"))


def _document(
    result: BenchmarkResult,
    table: Callable[[Cells, Sequence[Cells]], list[str]],
    heading: Callable[[str], str],
) -> list[str]:
    about = result.environment
    lines = [f"Size {result.size}. " + "; ".join(f"{k} {v}" for k, v in about.items())]
    lines += list(result.notes)
    for model in dict.fromkeys(row.model for row in result.rows):
        rows = [row for row in result.rows if row.model == model]
        lines.append(heading(model))
        lines += [f"{line}  " for line in _above(result, model)]
        lines.append("")
        timed = [row for row in rows if row.median is not None]
        order = list(dict.fromkeys(row.case for row in timed))
        timed.sort(key=lambda row: order.index(row.case))
        lines += table(HEADINGS, _without_repetition([_cells(row) for row in timed]))
        found = [_found(row) for row in rows]
        lines += ["", *(line for line in found if line)]
        failed = [row for row in rows if row.error]
        lines += [f"{row.case}, {row.kind} {row.dtype}: {row.error}" for row in failed]
    lines.append(heading("Goals"))
    goals = [
        [goal.what, goal.model, goal.wanted, _number(goal.value), str(goal.verdict)]
        for goal in result.goals
    ]
    lines += table(GOAL_HEADINGS, goals)
    return [line.rstrip() for line in lines]


def _above(result: BenchmarkResult, model: str) -> list[str]:
    """Equality and ceilings of one model."""
    lines = [str(c) for c in result.comparisons if c.model == model]
    found = [r.numbers for r in result.records if r.model == model and "read" in r.numbers]
    if found:
        units = {"read": "GB/s", "copy": "GB/s", "float32": "TFLOP/s", "bfloat16": "TFLOP/s"}
        parts = []
        for name, unit in units.items():
            scale = 1e9 if unit == "GB/s" else 1e12
            values = sorted(numbers[name] / scale for numbers in found)
            span = _number(values[0])
            span += "" if len(values) == 1 else f" to {_number(values[-1])}"
            parts.append(f"{name} {span} {unit}")
        lines.append("This machine at best: " + ", ".join(parts))
    return lines


def _cells(row: Row) -> Cells:
    assert row.median is not None
    mark = "" if row.equal is not False else " (outputs differ)"
    programs = "" if row.compilations is None else f"{row.compilations}"
    if row.compile_seconds:
        programs += f" in {row.compile_seconds:.1f} s"
    return [
        row.case,
        f"{row.kind} {row.dtype}{mark}",
        _seconds(row.median),
        _seconds(row.fastest),
        _percent(row.spread),
        _number(row.per_second),
        _number(row.bandwidth, 1e9),
        _number(row.rate, 1e12),
        _percent(row.share),
        _seconds(row.peer),
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        _number(row.peak_bytes, 1e9),
        programs,
    ]


def _found(row: Row) -> str | None:
    """The numbers of cases that are no times."""
    if row.case in _HIDDEN or not row.numbers:
        return None
    numbers = dict(row.numbers)
    parts = [
        f"{name.removesuffix('_bytes')} {value / 1e9:.3f} GB"
        if name.endswith("_bytes")
        else f"{name.replace('_', ' ')} {_number(value)}"
        for name, value in numbers.items()
    ]
    return f"{row.case}, {row.kind} {row.dtype}: {', '.join(parts)}"


def _without_repetition(rows: Sequence[Cells]) -> list[Cells]:
    """Names a case only in the first of its rows."""
    before = itertools.chain([""], (row[0] for row in rows))
    return [["" if row[0] == last else row[0], *row[1:]] for row, last in zip(rows, before)]  # noqa: B905


def _aligned(headings: Cells, rows: Sequence[Cells]) -> list[str]:
    used = [i for i, _ in enumerate(headings) if any(row[i] for row in rows)]
    lines = [[row[i] for i in used] for row in [headings, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = sum(heading in ("case", "implementation", *GOAL_HEADINGS) for heading in headings)
    text = [
        "  ".join(
            f"{cell:<{width}}" if i < words else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return [text[0], "-" * len(text[0]), *text[1:]]


def _piped(headings: Cells, rows: Sequence[Cells]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 10 else f"{_number(value * 1e3)} ms"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}".replace("%", " %")


def _number(value: float | None, scale: float = 1.0) -> str:
    """Three digits; more where they are before the point."""
    if value is None:
        return ""
    value /= scale
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
