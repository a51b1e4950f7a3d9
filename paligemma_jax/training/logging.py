"""Where the numbers of a run go: metrics.jsonl; TensorBoard, Weights & Biases if wanted.

The curve of a loss as a picture, with Pillow alone.

report.html: one page about a run, with its curve, its settings and its last answers.

How far a run is: a bar on terminals and in notebooks, lines elsewhere.

How fast a run is, and what share of the devices' arithmetic that takes.
"""

import base64
import contextlib
import dataclasses
import html
import importlib.util
import io
import json
import math
import os
import statistics
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from PIL import Image, ImageDraw

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.drawing import INK, load_font
from paligemma_jax.errors import MissingExtraError

METRICS = "metrics.jsonl"
_WANDB_ID = "wandb_id"


@runtime_checkable
class Writer(Protocol):
    """Takes the numbers of a step, and is closed at the end."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line and step: {"step": 10, "loss": 1.5}; NaN and infinities as text.

    A run that goes on from an earlier step drops the lines after it, so that no step comes twice.
    Every line is flushed: after a kill all but the last one are there.
    """

    def __init__(self, path: Path, after: int = 0):
        kept = [row for row in read_metrics(path) if row["step"] <= after]
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(_line(row) for row in kept))
        os.replace(beside, path)
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(_line({"step": step, **values}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files for `tensorboard --logdir WORKDIR`; MissingExtraError without tensorboardX."""

    def __init__(self, directory: Path):
        if not self.installed():
            raise MissingExtraError("Writing for TensorBoard", "train")
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), flush_secs=30)

    @staticmethod
    def installed() -> bool:
        """Whether the package that writes the files is there."""
        return importlib.util.find_spec("tensorboardX") is not None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Reports to a project at wandb.ai, or to files alone with WANDB_MODE=offline.

    A run that goes on in `directory` is the same run there. MissingExtraError without wandb.
    """

    def __init__(self, directory: Path, project: str, settings: Mapping[str, str]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise MissingExtraError("Reporting to Weights & Biases", "wandb") from e
        name = directory / _WANDB_ID
        if not name.exists():
            name.write_text(uuid.uuid4().hex)
        options: dict[str, Any] = dict(project=project, config=dict(settings))
        self._run = wandb.init(
            dir=str(directory), id=name.read_text(), name=directory.name, resume="allow", **options
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that was cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows.append(
                {
                    "step": int(row.pop("step")),
                    **{k: _metrics_log_number(v) for k, v in row.items()},
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return rows


def _line(row: Mapping[str, Any]) -> str:
    # JSON has no NaN.
    plain = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(plain) + "\n"


def _metrics_log_number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


Points = Sequence[tuple[int, float]]  # step, value

_SIZE = (960, 480)
_LEFT, _TOP, _RIGHT, _BOTTOM = 90, 44, 24, 52
_PALE, _STRONG, _SECOND = "#b8cdea", "#1f5fb4", "#c2410c"
_SCALE = 2  # drawn larger and made smaller, for smooth lines


def draw_curve(training: Points, validation: Points = (), title: str = "loss") -> Image.Image:
    """Training loss by step, pale, with its running median, and the validation loss in orange.

    The axis of losses is logarithmic where they span more than a factor of 20. Values that are no
    numbers are left out.
    """
    series = [_finite(training), _finite(validation)]
    width, height = (side * _SCALE for side in _SIZE)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    text, large = load_font(14 * _SCALE), load_font(18 * _SCALE)
    draw.text((_LEFT * _SCALE, 12 * _SCALE), title, INK, font=large)
    every = [point for points in series for point in points]
    if not every:
        draw.text((width // 2, height // 2), "nothing was measured", INK, font=text, anchor="mm")
        return image.resize(_SIZE, Image.Resampling.LANCZOS)
    frame = _Frame(every)
    for value in frame.ticks():
        y = frame.place((0, value))[1]
        draw.line((_LEFT * _SCALE, y, width - _RIGHT * _SCALE, y), fill="#e5e5e5", width=_SCALE)
        draw.text(((_LEFT - 10) * _SCALE, y), f"{value:.3g}", INK, font=text, anchor="rm")
    bottom = height - _BOTTOM * _SCALE
    for step in frame.steps():
        x = frame.place((step, every[0][1]))[0]
        draw.text((x, bottom + 10 * _SCALE), f"{step:,}", INK, font=text, anchor="ma")
    draw.line((_LEFT * _SCALE, bottom, width - _RIGHT * _SCALE, bottom), fill=INK, width=_SCALE)
    lines = [
        (series[0], _PALE, 1, "training"),
        (_running_median(series[0]), _STRONG, 2, "training, median"),
        (series[1], _SECOND, 2, "validation"),
    ]
    x = width - _RIGHT * _SCALE
    for points, colour, line, name in lines:
        if not points:
            continue
        places = [frame.place(point) for point in points]
        if len(places) > 1:
            draw.line(places, fill=colour, width=line * _SCALE, joint="curve")
        for px, py in places if len(places) < 30 else ():
            r = 2 * _SCALE
            draw.ellipse((px - r, py - r, px + r, py + r), fill=colour)
        draw.text((x, 15 * _SCALE), name, colour, font=text, anchor="ra")
        x -= round(draw.textlength(name, font=text)) + 18 * _SCALE
    return image.resize(_SIZE, Image.Resampling.LANCZOS)


class _Frame:
    """Where steps and losses are in the picture."""

    def __init__(self, points: Points):
        values = [value for _, value in points]
        self._first, self._last = points[0][0], points[0][0]
        for step, _ in points:
            self._first, self._last = min(self._first, step), max(self._last, step)
        low, high = min(values), max(values)
        self.logarithmic = low > 0 and high > 20 * low
        if self.logarithmic:
            self._low, self._high = math.log(low), math.log(high)
        else:
            self._low, self._high = (min(0.0, low), high)
        if self._high <= self._low:
            self._high = self._low + 1.0

    def place(self, point: tuple[int, int | float]) -> tuple[float, float]:
        step, value = point
        value = math.log(value) if self.logarithmic else value
        across = (step - self._first) / max(1, self._last - self._first)
        up = (value - self._low) / (self._high - self._low)
        x = _LEFT + across * (_SIZE[0] - _LEFT - _RIGHT)
        y = _SIZE[1] - _BOTTOM - up * (_SIZE[1] - _TOP - _BOTTOM)
        return x * _SCALE, y * _SCALE

    def ticks(self) -> list[float]:
        """Round losses between the lowest and the highest."""
        if self.logarithmic:
            low, high = math.floor(self._low / math.log(10)), math.ceil(self._high / math.log(10))
            found = [m * 10.0**e for e in range(low, high + 1) for m in (1, 2, 5)]
            inside = [v for v in found if self._low <= math.log(v) <= self._high]
            return inside if len(inside) < 9 else [v for v in inside if f"{v:e}"[0] == "1"]
        return _round_numbers(self._low, self._high, 6)

    def steps(self) -> list[int]:
        numbers = {round(x) for x in _round_numbers(self._first, self._last, 8)}
        return sorted(n for n in numbers if self._first <= n <= self._last)


def _round_numbers(low: int | float, high: int | float, most: int) -> list[float]:
    raw = max(high - low, 1e-12) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _finite(points: Points) -> list[tuple[int, float]]:
    return [(step, value) for step, value in points if math.isfinite(value)]


def _running_median(points: Points) -> list[tuple[int, float]]:
    window = max(1, len(points) // 40)
    if window == 1:
        return []
    return [
        (step, statistics.median(v for _, v in points[max(0, i - window) : i + window + 1]))
        for i, (step, _) in enumerate(points)
    ]


REPORT, CURVE, SAMPLES = "report.html", "loss.png", "samples.png"

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
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, str],
    outcome: Mapping[str, str],
) -> None:
    """Writes loss.png and report.html from the rows of metrics.jsonl; whole files or none.

    `outcome` are lines about how the run went; samples.png is shown if it is there.
    """
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    checked = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    curve = draw_curve(training, checked)
    _replace(workdir / CURVE, _png(curve))
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(workdir.name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(workdir.name)}</h1>",
        _table(outcome),
        f"<h2>Loss</h2>{_picture(_png(curve), 'loss by step')}",
        "<h2>Last values</h2>",
        _table({name: _report_number(value) for name, value in last.items()}),
    ]
    samples = workdir / SAMPLES
    if samples.exists():
        parts.append("<h2>Answers to validation records</h2>")
        parts.append(_picture(samples.read_bytes(), "pictures with prompts and answers"))
    parts += ["<h2>Settings</h2>", _table(settings), "</body></html>"]
    _replace(workdir / REPORT, "\n".join(parts).encode())


def save_picture(path: Path, picture: Image.Image) -> None:
    """Writes a PNG beside `path`, then renames it."""
    _replace(path, _png(picture))


def _table(rows: Mapping[str, str]) -> str:
    lines = [
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows.items()
    ]
    return f"<table>{''.join(lines)}</table>"


def _report_number(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def _picture(data: bytes, words: str) -> str:
    code = base64.b64encode(data).decode()
    return f"<img alt='{html.escape(words)}' src='data:image/png;base64,{code}'>"


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(data)
    os.replace(beside, path)


Update = Callable[[int, int, Mapping[str, float]], None]  # step, steps in all, newest numbers


@contextlib.contextmanager
def progress_bar() -> Iterator[Update]:
    """A bar with loss, samples/s, tokens/s, MFU where it is known, and the time that is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets has a bar of text
        from tqdm.auto import tqdm

    with tqdm(unit="step", file=sys.stderr, smoothing=0.05) as bar:

        def update(step: int, total: int, values: Mapping[str, float]) -> None:
            bar.set_postfix_str(describe(values), refresh=False)
            if bar.total is None:  # the first step was compiled, which says nothing about the rest
                bar.reset(total)
                bar.initial = bar.n = step
                bar.refresh()
            else:
                bar.update(step - bar.n)

        yield update


@contextlib.contextmanager
def progress_lines() -> Iterator[Update]:
    """A line on standard error whenever there are new numbers."""
    last: list[object] = [None]

    def update(step: int, total: int, values: Mapping[str, float]) -> None:
        logged = values.get("samples_per_second")
        if logged != last[0] or step == total:
            last[0] = logged
            print(f"step {step}/{total} {describe(values)}", file=sys.stderr, flush=True)

    yield update


def describe(values: Mapping[str, float]) -> str:
    """The numbers of a step in one line."""
    shown = [f"loss {values['loss']:.4g}"]
    if "validation_loss" in values:
        shown.append(f"validation {values['validation_loss']:.4g}")
    if "samples_per_second" in values:
        shown.append(f"{values['samples_per_second']:.3g} samples/s")
        shown.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        shown.append(f"MFU {values['mfu']:.0%}")
    return ", ".join(shown)


# Dense products of bfloat16 (float16 on a T4), operations/s of one device, from the makers' tables.
_PEAKS: Mapping[str, float] = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "T4": 65e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 61e12,
}


def device_peak() -> float | None:
    """Operations/s of one device at best; None where it is not known, as on CPUs."""
    kind = jax.devices()[0].device_kind.lower()
    return next((peak for name, peak in _PEAKS.items() if name.lower() in kind), None)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one example costs.

    Attributes:
      tokens: of picture and text, as the decoder sees them.
      operations: of its forward and backward pass; what is computed twice to save memory counts
        once, as MFU is defined (arXiv 2204.02311, appendix B).
    """

    tokens: int
    operations: float


def work_of(
    config: PaliGemmaConfig,
    text_length: int,
    *,
    images: int = 1,
    image_trained: bool = True,
    text_trained: bool = True,
) -> Work:
    """The work on one example; frozen weights need no gradients of their own.

    `image_trained` and `text_trained` say whether the weights of the encoder and of the decoder
    (most of them) are trained. Where nothing of the encoder is, it is not gone back through.
    """
    img, llm = config.img, config.llm
    patches = img.num_patches
    attention = 4 * img.width * img.width + 2 * img.width * img.mlp_dim
    encoder = 2 * patches * img.depth * attention + 4 * patches**2 * img.width * img.depth
    encoder += 2 * patches * (3 * img.patch_size**2 * img.width + img.width * llm.width)
    tokens = images * patches + text_length
    layer = llm.width * llm.head_dim * (2 * llm.num_heads + 2 * llm.num_kv_heads)
    layer += 3 * llm.width * llm.mlp_dim
    decoder = 2 * tokens * llm.depth * layer
    decoder += 4 * tokens**2 * llm.num_heads * llm.head_dim * llm.depth
    decoder += 2 * text_length * llm.width * llm.vocab_size
    # Forward once; backward as much again for what lies before, and again for weights.
    passes = 1 + (2 if image_trained else 0)
    operations = images * encoder * passes + decoder * (3 if text_trained else 2)
    return Work(tokens, float(operations))


class Pace:
    """Rates over the steps since it was last asked; pauses can be left out."""

    def __init__(self, work: Work, batch_size: int):
        self._work, self._batch_size = work, batch_size
        peak = device_peak()
        self._peak = None if peak is None else peak * jax.device_count()
        self._start, self._steps = time.perf_counter(), 0

    def step(self) -> None:
        """One more step was made."""
        self._steps += 1

    def restart(self) -> None:
        """Forgets what was; to be called after a pause."""
        self._start, self._steps = time.perf_counter(), 0

    def rates(self) -> dict[str, float]:
        """samples/s, tokens/s, seconds a step and, where the device is known, MFU (0 to 1)."""
        elapsed, steps = time.perf_counter() - self._start, self._steps
        self.restart()
        if not steps or elapsed <= 0:
            return {}
        samples = steps * self._batch_size / elapsed
        found = {
            "samples_per_second": samples,
            "tokens_per_second": samples * self._work.tokens,
            "seconds_per_step": elapsed / steps,
        }
        if self._peak:
            found["mfu"] = samples * self._work.operations / self._peak
        return found
