"""What a run shows of itself: loss.png, samples.png, and report.html with both."""

import base64
import dataclasses
import html
import io
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from paligemma_jax.data.contact_sheet import Panel, contact_sheet
from paligemma_jax.data.record import Record
from paligemma_jax.drawing import INK, load_font
from paligemma_jax.processing.masks import MaskCodec

REPORT, CURVE, SAMPLES = "report.html", "loss.png", "samples.png"
Number = float | int
Points = Sequence[tuple[int, float]]  # step, value

_WIDTH, _HEIGHT = 960, 480
_LEFT, _TOP, _RIGHT, _BOTTOM = 90, 44, 24, 52
_SCALE = 2  # drawn larger and then reduced, for smooth lines


def draw_curve(training: Points, validation: Points = ()) -> Image.Image:
    """Training loss by step with its running median, and the validation loss in orange.

    The axis of losses is logarithmic where they span more than a factor of 20. Values that are not
    finite are left out.
    """
    shown, checked = (
        [(step, value) for step, value in points if math.isfinite(value)]
        for points in (training, validation)
    )
    image = Image.new("RGB", (_WIDTH * _SCALE, _HEIGHT * _SCALE), "white")
    pen, font = ImageDraw.Draw(image), load_font(14 * _SCALE)

    def write(x: Number, y: Number, text: str, color: str = INK, anchor: str = "ma") -> None:
        pen.text((x * _SCALE, y * _SCALE), text, color, font=font, anchor=anchor)

    def line(points: Sequence[tuple[Number, Number]], color: str, width: int = 1) -> None:
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        pen.line(scaled, color, width * _SCALE, joint="curve")
        for x, y in scaled if len(scaled) < 30 and width > 1 else ():
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), color)

    write(_LEFT, 12, "loss", anchor="la")
    if not shown + checked:
        write(_WIDTH / 2, _HEIGHT / 2, "nothing was measured")
        return image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)
    steps, values = zip(*shown, *checked, strict=True)
    logarithmic = min(values) > 0 and max(values) > 20 * min(values)
    axis = math.log10 if logarithmic else float
    low, high = axis(min(values)) if logarithmic else min(0.0, *values), axis(max(values))
    first, last = min(steps), max(steps)

    def place(step: Number, value: Number) -> tuple[float, float]:
        across = (step - first) / max(1, last - first)
        up = (axis(value) - low) / ((high - low) or 1.0)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    for tick in _ticks(low, high, 6):
        value = 10**tick if logarithmic else tick
        y = place(first, value)[1]
        line([(_LEFT, y), (_WIDTH - _RIGHT, y)], "#e5e5e5")
        write(_LEFT - 10, y, f"{value:.3g}", anchor="rm")
    for step in sorted({round(tick) for tick in _ticks(first, last, 8)}):
        write(place(step, values[0])[0], _HEIGHT - _BOTTOM + 10, f"{step:,}")
    line([(_LEFT, _HEIGHT - _BOTTOM), (_WIDTH - _RIGHT, _HEIGHT - _BOTTOM)], INK)
    series = [
        (shown, "#b8cdea", 1, "training"),
        (_running_median(shown), "#1f5fb4", 2, "training, median"),
        (checked, "#c2410c", 2, "validation"),
    ]
    x = _WIDTH - _RIGHT
    for points, color, width, name in series:
        if points:
            line([place(*point) for point in points], color, width)
            write(x, 15, name, color, anchor="ra")
            x -= pen.textlength(name, font=font) / _SCALE + 18
    return image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)


def _ticks(low: Number, high: Number, most: int) -> list[float]:
    """Round numbers between the lowest and the highest."""
    raw = max(high - low, 1e-12) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _running_median(points: Points) -> list[tuple[int, float]]:
    window = len(points) // 40
    return [
        (step, statistics.median(v for _, v in points[max(0, i - window) : i + window + 1]))
        for i, (step, _) in enumerate(points if window > 1 else ())
    ]


_RIGHT_COLOR, _WRONG_COLOR = "#15803d", "#b91c1c"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A record and what the model answered; the record's own answers are `targets`."""

    record: Record
    answer: str

    @property
    def targets(self) -> tuple[str, ...]:
        """What was to be answered."""
        return self.record.answers or (self.record.suffix,)

    @property
    def exact_match(self) -> bool:
        """Whether the answer is one of the targets, letter by letter."""
        return self.answer in self.targets


def draw_samples(samples: Sequence[Sample], codec: MaskCodec | None = None) -> Image.Image:
    """One image of all: each with the boxes and masks answered, prompt, answer and target."""
    panels = []
    for sample in samples:
        color = _RIGHT_COLOR if sample.exact_match else _WRONG_COLOR
        texts = [(sample.record.prefix, INK), (sample.answer, color)]
        if not sample.exact_match:
            texts.append((sample.targets[0], _RIGHT_COLOR))
        panels.append(Panel(sample.record.images, sample.answer, tuple(texts)))
    return contact_sheet(panels, codec)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem }
img { max-width: 100%; border: 1px solid #ddd }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #eee;
         vertical-align: top; overflow-wrap: anywhere }
"""


def write_report(
    workdir: Path,
    lines: Sequence[Mapping[str, Any]],
    settings: Mapping[str, str],
    outcome: Mapping[str, str],
) -> None:
    """Writes loss.png and report.html from the lines of metrics.jsonl; whole files or none.

    `outcome` says how the run went; samples.png is shown if it is there.
    """
    curves = [
        [(line["step"], line[name]) for line in lines if name in line]
        for name in ("loss", "validation_loss")
    ]
    save_image(workdir / CURVE, draw_curve(*curves))
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    numbers = {k: f"{v:,.6g}" if isinstance(v, float) else str(v) for k, v in last.items()}
    title = html.escape(workdir.name)
    samples = _image(workdir / SAMPLES, "images with prompts and answers")
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>",
        _table(outcome),
        f"<h2>Loss</h2>{_image(workdir / CURVE, 'loss by step')}",
        f"<h2>Last values</h2>{_table(numbers)}",
        f"<h2>Answers to validation records</h2>{samples}" if samples else "",
        f"<h2>Settings</h2>{_table(settings)}</body></html>",
    ]
    _replace(workdir / REPORT, "\n".join(parts).encode())


def save_image(path: Path, image: Image.Image) -> None:
    """Writes a PNG beside `path`, then renames it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    _replace(path, buffer.getvalue())


def _table(values: Mapping[str, str]) -> str:
    lines = [
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in values.items()
    ]
    return f"<table>{''.join(lines)}</table>"


def _image(path: Path, text: str) -> str:
    if not path.exists():
        return ""
    code = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='{html.escape(text)}' src='data:image/png;base64,{code}'>"


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(data)
    os.replace(beside, path)
