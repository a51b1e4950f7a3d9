"""The report of a run: tables for a terminal or in Markdown, and JSON."""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paligemma_jax.benchmark.results import CaseResult, Comparison, Measurement, summarize
from paligemma_jax.benchmark.targets import Judged, judge

FORMAT = 2
Cells = list[str]
Table = Callable[[Cells, Sequence[Cells]], list[str]]
HEADINGS = [
    "case", "implementation", "median", "min", "spread", "throughput", "GB/s", "TFLOP/s",
    "of roofline", "baseline", "speedup", "peak GB", "compilations",
]  # fmt: skip
TARGET_HEADINGS = ["target", "model", "wanted", "measured", "verdict"]
_HIDDEN = ("roofline", "outputs")  # named above the table


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """What every process has found out, and what follows from it.

    `str` of it is the report for a terminal, `to_markdown()` the one for a file.
    """

    size: str
    on_cpu: bool
    environment: dict[str, str]
    results: tuple[CaseResult, ...]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def measurements(self) -> list[Measurement]:
        """One for each case, implementation and precision of each model."""
        return summarize(self.results, self.comparisons, on_cpu=self.on_cpu)

    @functools.cached_property
    def targets(self) -> list[Judged]:
        """Every target with its verdict."""
        return judge(self.measurements, on_cpu=self.on_cpu)

    def __str__(self) -> str:
        return "\n".join(self._lines(_aligned, "\n{}"))

    def to_markdown(self) -> str:
        """The same as Markdown."""
        return "\n".join(self._lines(_piped, "\n### {}\n"))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "format": FORMAT,
            "size": self.size,
            "on_cpu": self.on_cpu,
            "environment": self.environment,
            "notes": list(self.notes),
            "comparisons": [dataclasses.asdict(comparison) for comparison in self.comparisons],
            "measurements": [dataclasses.asdict(m) for m in self.measurements],
            "targets": [dataclasses.asdict(target) for target in self.targets],
            "results": [dataclasses.asdict(result) for result in self.results],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; a file of that name is replaced when the new one is complete."""
        target = Path(path)
        unfinished = target.with_name(target.name + ".part")
        unfinished.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        unfinished.replace(target)

    def _lines(self, table: Table, heading: str) -> list[str]:
        lines = [f"Size {self.size}. " + "; ".join(f"{k} {v}" for k, v in self.environment.items())]
        lines += list(self.notes)
        for model in dict.fromkeys(m.model for m in self.measurements):
            found = [m for m in self.measurements if m.model == model]
            timed = [m for m in found if m.median is not None]
            order = list(dict.fromkeys(m.case for m in timed))
            timed.sort(key=lambda m: order.index(m.case))
            comparisons = [str(c) for c in self.comparisons if c.model == model]
            above = [*comparisons, *self._roofline(model)]
            lines += [heading.format(model), *(f"{line}  " for line in above), ""]
            lines += table(HEADINGS, _without_repetition([_cells(m) for m in timed]))
            lines += ["", *(_numbers(m) for m in found if m.numbers and m.case not in _HIDDEN)]
            lines += [
                f"{m.case}, {m.implementation} {m.dtype}: {m.error}" for m in found if m.error
            ]
        lines.append(heading.format("Targets"))
        targets = [
            [t.what, t.model, t.target, _number(t.value), str(t.verdict)] for t in self.targets
        ]
        return [line.rstrip() for line in [*lines, *table(TARGET_HEADINGS, targets)]]

    def _roofline(self, model: str) -> list[str]:
        found = [r.numbers for r in self.results if r.model == model and r.case == "roofline"]
        parts = []
        for name in ("read", "copy", "float32", "bfloat16") if found else ():
            unit, scale = ("GB/s", 1e9) if name in ("read", "copy") else ("TFLOP/s", 1e12)
            values = sorted({_number(numbers[name], scale) for numbers in found}, key=_as_number)
            span = values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
            parts.append(f"{name} {span} {unit}")
        return ["Roofline of this machine: " + ", ".join(parts)] if parts else []


def _cells(m: Measurement) -> Cells:
    mark = "" if m.equal is not False else " (outputs differ)"
    compilations = "" if m.compilations is None else f"{m.compilations}"
    if m.compile_seconds:
        compilations += f" in {m.compile_seconds:.1f} s"
    each = "/token" if m.unit == "token" else ""
    return [
        m.case,
        f"{m.implementation} {m.dtype}{mark}",
        _seconds(m.median, each),
        _seconds(m.fastest, each),
        _percent(m.spread),
        "" if m.throughput is None else f"{_number(m.throughput)} {m.unit}s/s",
        _number(m.bandwidth, 1e9),
        _number(m.flops, 1e12),
        _percent(m.roofline_fraction),
        _seconds(m.baseline, each),
        "" if m.speedup is None else f"{m.speedup:.2f}x",
        _number(m.peak_bytes, 1e9),
        compilations,
    ]


def _numbers(m: Measurement) -> str:
    """What was found out besides times."""
    parts = [
        f"{name.removesuffix('_bytes')} {value / 1e9:.3f} GB"
        if name.endswith("_bytes")
        else f"{name.replace('_', ' ')} {_number(value)}"
        for name, value in m.numbers.items()
    ]
    return f"{m.case}, {m.implementation} {m.dtype}: {', '.join(parts)}"


def _without_repetition(rows: Sequence[Cells]) -> list[Cells]:
    """Names a case only in the first of its rows."""
    before = itertools.chain([""], (row[0] for row in rows))
    return [["" if row[0] == last else row[0], *row[1:]] for row, last in zip(rows, before)]  # noqa: B905


def _aligned(headings: Cells, rows: Sequence[Cells]) -> list[str]:
    used = [i for i, _ in enumerate(headings) if any(row[i] for row in rows)]
    lines = [[row[i] for i in used] for row in [headings, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = sum(heading in ("case", "implementation", *TARGET_HEADINGS) for heading in headings)
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


def _seconds(value: float | None, each: str = "") -> str:
    if value is None:
        return ""
    return f"{value:.2f} s{each}" if value >= 10 else f"{_number(value * 1e3)} ms{each}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}".replace("%", " %")


def _number(value: float | None, scale: float = 1.0) -> str:
    """Three digits; more if they are before the point."""
    if value is None:
        return ""
    value /= scale
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _as_number(text: str) -> float:
    return float(text.replace(",", ""))
