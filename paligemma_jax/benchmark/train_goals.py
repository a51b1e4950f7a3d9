"""What is aimed at in training, beside Hugging Face's and of the device's arithmetic."""

from collections.abc import Callable

from paligemma_jax.benchmark.implementation import Kind, Precision
from paligemma_jax.benchmark.rows import Rows
from paligemma_jax.benchmark.summary import Row

Value = Callable[[Rows], float | None]


def faster(dtype: Precision) -> Value:
    """How many samples of ours a second for one of Hugging Face's."""

    def value(rows: Rows) -> float | None:
        ours, theirs = _pair(rows, dtype)
        if ours is None or theirs is None or not ours.median or not theirs.median:
            return None
        return theirs.median / ours.median

    return value


def smaller(dtype: Precision) -> Value:
    """Our peak memory by Hugging Face's."""

    def value(rows: Rows) -> float | None:
        ours, theirs = _pair(rows, dtype)
        if ours is None or theirs is None or not ours.peak_bytes or not theirs.peak_bytes:
            return None
        return ours.peak_bytes / theirs.peak_bytes

    return value


def utilisation(dtype: Precision) -> Value:
    """MFU of ours: operations a second by the most that the device's maker tells."""

    def value(rows: Rows) -> float | None:
        ours = rows.trained(Kind.OURS, dtype)
        peak = None if ours is None else ours.numbers.get("datasheet_rate")
        return None if ours is None or peak is None or not ours.rate else ours.rate / peak

    return value


def _pair(rows: Rows, dtype: Precision) -> tuple[Row | None, Row | None]:
    return rows.trained(Kind.OURS, dtype), rows.trained(Kind.HUGGING_FACE, dtype)
