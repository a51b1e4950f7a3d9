"""What happens when the loss is no number, or explodes."""

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from paligemma_jax.errors import PaliGemmaError

BAD_BATCHES = "bad_batches.jsonl"
_RECENT = 50  # steps whose median a loss is compared with
_ENOUGH = 10  # of them before any comparison


class DivergedError(PaliGemmaError):
    """The loss was no number, or far above what it had been."""


@runtime_checkable
class BadLoss(Protocol):
    """What to do about bad losses.

    Attributes:
      factor: a loss so many times the median of the last 50 has exploded; infinity: none has.
      skips: bad steps in a row that are left out before the run stops.
    """

    @property
    def factor(self) -> float: ...

    @property
    def skips(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class StopAtBadLoss:
    """The run stops at the first one."""

    factor: float = math.inf

    @property
    def skips(self) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class SkipBadLoss:
    """Updates whose loss or gradients are no numbers are left out, up to `skips` in a row.

    An exploded loss (`factor`) that is a number is counted, but its update stays made.
    """

    skips: int = 10
    factor: float = math.inf


class LossWatch:
    """Looks at every loss in turn, and keeps the ids of bad batches in bad_batches.jsonl."""

    def __init__(self, policy: BadLoss, workdir: Path):
        self._policy = policy
        self._path = workdir / BAD_BATCHES
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._in_a_row = 0
        self.skipped = 0

    def state(self) -> dict[str, Any]:
        """All that it remembers, as JSON has it."""
        return {
            "recent": list(self._recent),
            "in_a_row": self._in_a_row,
            "skipped": self.skipped,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from another one's `state()`; from the start without one."""
        self._recent.clear()
        self._recent.extend(state.get("recent", ()))
        self._in_a_row = state.get("in_a_row", 0)
        self.skipped = state.get("skipped", 0)

    def see(self, step: int, loss: float, gradient: float, ids: Sequence[str]) -> None:
        """One step's loss and norm of gradients; raises DivergedError where the run must stop."""
        problem = self._problem(loss, gradient)
        if not problem:
            self._recent.append(loss)
            self._in_a_row = 0
            return
        with self._path.open("a") as file:
            row = {"step": step, "loss": str(loss), "gradient": str(gradient), "ids": list(ids)}
            file.write(json.dumps(row) + "\n")
        self._in_a_row += 1
        self.skipped += 1
        if self._in_a_row > self._policy.skips:
            many = f", the {self._in_a_row}th bad one in a row" if self._in_a_row > 1 else ""
            raise DivergedError(
                f"At step {step} {problem}{many}. The ids of its records are in {self._path}; the "
                "last checkpoint is from before it. A lower learning rate, clipping "
                "(clip_norm=1.0), or data without these records fits. To leave such steps out: "
                "--config.bad_loss='SkipBadLoss(10)'"
            )

    def _problem(self, loss: float, gradient: float) -> str:
        if not math.isfinite(loss):
            return f"the loss was {loss}"
        if not math.isfinite(gradient):
            return f"the gradients' norm was {gradient}"
        if len(self._recent) >= _ENOUGH:
            usual = statistics.median(self._recent)
            if loss > self._policy.factor * usual:
                return f"the loss was {loss:.4g}, {loss / usual:.0f} times the usual {usual:.4g}"
        return ""
