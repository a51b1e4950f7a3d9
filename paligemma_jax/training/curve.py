"""The curve of a loss as a picture, with Pillow alone."""

import math
import statistics
from collections.abc import Sequence

from PIL import Image, ImageDraw

from paligemma_jax.viz.drawing import INK, load_font

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
