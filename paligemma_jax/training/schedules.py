"""Factors on the learning rate by step: big_vision's schedules, with warm-up and cool-down.

A schedule goes from 0 to 1 and multiplies the learning rate and the weight decay. Step 0 is the
first update, so that a warm-up's first update is exactly zero, as in big_vision.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from paligemma_jax.errors import ConfigError

Factor = Callable[[Any], jax.Array]  # of the number of updates made before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """How long training is: what durations are measured against.

    `batch_size` is of all processes together; `data_size` is the number of examples of one epoch,
    None where it is not known.
    """

    total_steps: int
    batch_size: int | None = None
    data_size: int | None = None


@runtime_checkable
class Duration(Protocol):
    """A part of the run."""

    def steps(self, run: Run) -> int:
        """The same in steps."""
        ...


@dataclasses.dataclass(frozen=True)
class Steps:
    """A number of steps."""

    count: int

    def steps(self, run: Run) -> int:
        return self.count


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of all steps, between 0 and 1 (big_vision's percent)."""

    share: float | int

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ConfigError(
                f"A share of {self.share} of the run is none. Shares from 0.0 to 1.0 fit. "
                "Write Share(0.05) for 5 %"
            )

    def steps(self, run: Run) -> int:
        return _whole(self.share * run.total_steps)


@dataclasses.dataclass(frozen=True)
class Examples:
    """A number of examples."""

    count: float | int

    def steps(self, run: Run) -> int:
        return _whole(self.count / _known(run.batch_size, "batch_size"))


@dataclasses.dataclass(frozen=True)
class Epochs:
    """A number of passes over the data."""

    count: float | int

    def steps(self, run: Run) -> int:
        size = _known(run.data_size, "data_size")
        return _whole(self.count * size / _known(run.batch_size, "batch_size"))


def _whole(steps: float) -> int:
    """The nearest number, but at least one unless it is zero."""
    return max(1, round(steps)) if steps else 0


def _known(size: int | None, name: str) -> int:
    if not size:
        raise ConfigError(
            f"A duration is given that needs the run's {name}, which is {size}. A positive number "
            f"fits. Give Run({name}=...), or the duration as Steps(...) or Share(...)"
        )
    return size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """Warm-up from 0, a decay by subclass over the rest, and a cool-down to 0 at the end."""

    warmup: Duration = Steps(0)
    cooldown: Duration = Steps(0)

    @abc.abstractmethod
    def decay(self, progress: jax.Array, since: jax.Array) -> jax.Array:
        """The factor after `since` steps (below 0 in the warm-up), `progress` of those there are.

        `progress` is f32[] and stays between 0 and 1.
        """

    def factor(self, run: Run) -> Factor:
        """The schedule of one run; the factor is f32[]."""
        warmup, cooldown = self.warmup.steps(run), self.cooldown.steps(run)
        total = run.total_steps
        if total > 1 and warmup >= total:
            raise ConfigError(
                f"A warm-up of {warmup} steps leaves nothing of a run of {total}. Fewer steps fit. "
                "Write warmup=Share(0.05)"
            )

        def at(step: Any) -> jax.Array:
            done = jnp.asarray(step, jnp.float32)
            since = done - warmup
            factor = self.decay(jnp.clip(since / max(total - warmup, 1), 0.0, 1.0), since)
            if warmup:
                factor = factor * jnp.minimum(1.0, done / warmup)
            if cooldown:
                factor = factor * jnp.minimum(1.0, (total - done) / cooldown)
            return jnp.asarray(factor, jnp.float32)

        return at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """1 after the warm-up."""

    def decay(self, progress: jax.Array, since: jax.Array) -> jax.Array:
        return jnp.ones_like(progress)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine, from 1 after the warm-up to 0 at the end."""

    def decay(self, progress: jax.Array, since: jax.Array) -> jax.Array:
        return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """From 1 after the warm-up to `end`, straight or as a power of what is left."""

    end: float = 0.0
    power: float = 1.0

    def decay(self, progress: jax.Array, since: jax.Array) -> jax.Array:
        return self.end + (1.0 - self.end) * (1.0 - progress) ** self.power


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReciprocalSquareRoot(Schedule):
    """1 / sqrt(1 + steps / timescale): never ends (arXiv 2106.04560); big_vision's rsqrt.

    `shift` is the number of steps made before, in a run that this one goes on with.
    """

    timescale: float | int = 10_000
    shift: float | int = 0

    def decay(self, progress: jax.Array, since: jax.Array) -> jax.Array:
        return jax.lax.rsqrt(1.0 + (jnp.maximum(since, 0.0) + self.shift) / self.timescale)
