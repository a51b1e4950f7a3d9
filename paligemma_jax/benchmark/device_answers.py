"""What a question to a device brings: rows of a table, and how the time was taken."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax


@dataclasses.dataclass(frozen=True)
class Answer:
    """One measured number; `note` says what was seen besides, or why there is no number."""

    question: str
    case: str
    value: float | None
    unit: str
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is; what is given here is PaliGemma 3B."""

    width: int = 2048
    hidden: int = 16_384
    heads: int = 8
    head_dim: int = 256
    vocabulary: int = 257_152
    layers: int = 18
    slots: int = 512
    steps: int = 64
    rows: tuple[int, ...] = (1, 8, 64)
    copies: int = 16  # of a matrix, so that none stays in the cache
    long: int = 4096  # tokens of a prefill, of an image at 896 pixels
    chain: int = 300  # kernels one after the other
    megabytes: int = 1024  # to copy to the device


TINY = Sizes(
    width=16,
    hidden=32,
    heads=2,
    head_dim=8,
    vocabulary=64,
    layers=2,
    slots=16,
    steps=4,
    rows=(1, 2),
    copies=2,
    long=16,
    chain=3,
    megabytes=1,
)


Measured = tuple[float, str, str]  # value, unit, note


class Question(Protocol):
    """Yields answers; what it raises is noted, and the next question is asked."""

    def __call__(self, sizes: Sizes) -> Iterator[Answer]: ...


def seconds_per_call(call: Callable[[], Any], calls: int = 10, repeats: int = 3) -> float:
    """Least seconds of a call among `repeats` runs of `calls`, which are sent off without waiting.

    The first call compiles and is not counted.
    """
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        results = [call() for _ in range(calls)]
        jax.block_until_ready(results[-1])
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def attempt(question: str, case: str, measure: Callable[..., Measured], *arguments: Any) -> Answer:
    """A row with the value, unit and note of `measure(*arguments)`, or with why there is none."""
    try:
        return Answer(question, case, *measure(*arguments))
    except Exception as e:  # a case that a device or a version does not know ends nothing else
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        return Answer(question, case, None, "", reason[:160])
