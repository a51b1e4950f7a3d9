"""Repeated calls with a clock, and with an eye on what else the machine does meanwhile."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Sample:
    """One timed call: wall-clock seconds, and how many CPUs other processes kept busy (share)."""

    seconds: float
    others: float

    def a_token(self, tokens: int) -> "Sample":
        """Of one of so many tokens, the first of which was there when it began."""
        return dataclasses.replace(self, seconds=self.seconds / (tokens - 1))


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to go on measuring: at least `fewest` samples, then until a limit is reached."""

    fewest: int = 3
    most: int = 20
    seconds: float = 3.0


def sample(call: Callable[[], object]) -> Sample:
    """Times one call."""
    watch = Stopwatch()
    call()
    return watch.stop()


def measure(calls: Sequence[Callable[[], Sample]], effort: Effort) -> list[list[Sample]]:
    """What each call says of itself, in turn so that all see the same machine.

    They must be warm: compiled, and done once.
    """
    taken: list[list[Sample]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(taken[0]) < effort.fewest or (
        len(taken[0]) < effort.most and time.perf_counter() - start < effort.seconds
    ):
        for call, samples in zip(calls, taken, strict=True):
            samples.append(call())
    return taken


class Stopwatch:
    """Runs from its making on."""

    def __init__(self) -> None:
        self._busy = Busyness()
        self._start = time.perf_counter()

    def stop(self) -> Sample:
        """What passed until now."""
        return Sample(time.perf_counter() - self._start, self._busy.others())


class Busyness:
    """CPU time of the machine and of this process, from now on."""

    def __init__(self) -> None:
        self._start = self._read()

    def others(self) -> float:
        """Share of all CPUs that others have used since; 0.0 where the system does not tell."""
        (total, busy, own), (total0, busy0, own0) = self._read(), self._start
        if total <= total0:
            return 0.0
        return max(0.0, (busy - busy0) - (own - own0)) / (total - total0)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: of all CPUs, of those the busy ones, and this process's."""
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return 0.0, 0.0, 0.0
        tick = os.sysconf("SC_CLK_TCK")
        own = os.times()
        idle = fields[3] + fields[4]
        return sum(fields) / tick, (sum(fields) - idle) / tick, own.user + own.system
