"""What a case is: something to measure on any implementation."""

import abc
import dataclasses
from collections.abc import Mapping

import numpy as np

from paligemma_jax.benchmark.floors import Work
from paligemma_jax.benchmark.implementation import Implementation, Precision
from paligemma_jax.benchmark.timing import Sample
from paligemma_jax.config import PaliGemmaConfig


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a case runs on: a loaded implementation, and what the process held without it.

    `compiles` is whether the first call of something takes far longer than the next.
    """

    implementation: Implementation
    config: PaliGemmaConfig
    compiles: bool = True
    bare_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Samples (seconds for one call, or for one token a row), other numbers, arrays to compare."""

    samples: list[Sample] = dataclasses.field(default_factory=list)
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Case(abc.ABC):
    """One thing to measure."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The same for all implementations."""

    @property
    def rows(self) -> int:
        """Pictures, or tokens, that one sample yields; 0 where that says nothing."""
        return 0

    def work(self, config: PaliGemmaConfig, precision: Precision) -> tuple[Work, ...]:
        """What one sample must do at least, one part after the other; () where nothing is timed."""
        return ()

    @abc.abstractmethod
    def run(self, subject: Subject) -> Outcome:
        """Measures."""
