"""The optimizer: big_vision's chain on optax, its schedules, and the durations they are given in.

    clip by global norm -> optimizer -> * learning rate -> + weight decay * weights -> * -schedule

So weight decay is scaled by the schedule but not by the learning rate: 0.1 in the convention of
`optax.adamw` and PyTorch is `weight_decay=0.1 * learning_rate` here, or `AdamW(weight_decay=0.1)`.
By default only paths ".*/kernel" decay, as in big_vision: the eight matrices of the image encoder.
No weight of Gemma is called kernel (`w`; big_vision: `w`, `gating_einsum`, `linear`), so none of
them decays unless a rule says so.
"""

import abc
import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.layers import DType
from paligemma_jax.models.sharding import Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLength:
    """What durations are measured against.

    `batch_size` is of all processes together; `data_size` is the number of examples of one epoch,
    None where it is not known.
    """

    total_steps: int
    batch_size: int | None = None
    data_size: int | None = None


class _Duration(abc.ABC):
    def __post_init__(self) -> None:
        count: Any = next(iter(vars(self).values()))
        kind = numbers.Integral if isinstance(self, Steps) else numbers.Real
        if (
            not isinstance(count, kind)
            or isinstance(count, bool)
            or not 0 <= float(count) < math.inf
        ):
            what = "whole" if isinstance(self, Steps) else "finite"
            raise ConfigError(
                f"expected a {what} number from 0 up in {type(self).__name__}, got {count!r}"
            )

    def steps(self, run: RunLength) -> int:
        """This duration in steps: the nearest number, but at least one unless it is zero."""
        steps = self._exact(run)
        return max(1, round(steps)) if steps > 0 else round(steps)

    @abc.abstractmethod
    def _exact(self, run: RunLength) -> float | int: ...


@dataclasses.dataclass(frozen=True)
class Steps(_Duration):
    """A number of steps."""

    count: int

    def _exact(self, run: RunLength) -> float | int:
        return self.count


@dataclasses.dataclass(frozen=True)
class Fraction(_Duration):
    """A fraction of all steps, between 0 and 1 (big_vision's percent)."""

    fraction: float | int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fraction > 1.0:
            raise ConfigError(
                f"expected a fraction of training from 0.0 to 1.0, got {self.fraction}. "
                "Write Fraction(0.05) for 5 %"
            )

    def _exact(self, run: RunLength) -> float | int:
        return self.fraction * run.total_steps


@dataclasses.dataclass(frozen=True)
class Examples(_Duration):
    """A number of examples."""

    count: float | int

    def _exact(self, run: RunLength) -> float | int:
        return self.count / _known(run, "batch_size")


@dataclasses.dataclass(frozen=True)
class Epochs(_Duration):
    """A number of passes over the data."""

    count: float | int

    def _exact(self, run: RunLength) -> float | int:
        return self.count * _known(run, "data_size") / _known(run, "batch_size")


Duration = Steps | Fraction | Examples | Epochs


def _known(run: RunLength, name: str) -> int:
    if size := getattr(run, name):
        return size
    raise ConfigError(
        f"expected the run's {name}, which this duration needs, got {size}. Pass "
        f"RunLength({name}=...), or give the duration as Steps(...) or Fraction(...)"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """Factor on the learning rate: warm-up from 0, a decay by subclass, and a cool-down to 0.

    It multiplies the weight decay too. Step 0 is the first update, so that the first update of a
    warm-up is exactly zero, as in big_vision.
    """

    warmup: Duration = Steps(0)
    cooldown: Duration = Steps(0)

    @abc.abstractmethod
    def decay(self, steps: int) -> optax.Schedule:
        """The factor by the number of updates made after the warm-up, of `steps` there are."""

    def factor(self, run: RunLength) -> optax.Schedule:
        """The factor f32[] by the number of updates made before."""
        warmup, cooldown = self.warmup.steps(run), self.cooldown.steps(run)
        total = run.total_steps
        if total > 1 and warmup >= total:
            raise ConfigError(
                f"expected a warm-up shorter than the run, got {warmup} steps of {total}. "
                "Write warmup=Fraction(0.05)"
            )
        decay = self.decay(max(total - warmup, 1))

        def at(step: Any) -> jax.Array:
            done = jnp.asarray(step, jnp.float32)
            factor: Any = decay(jnp.maximum(done - warmup, 0.0))
            if warmup:
                factor = factor * jnp.minimum(1.0, done / warmup)
            if cooldown:
                factor = factor * jnp.minimum(1.0, (total - done) / cooldown)
            return jnp.asarray(factor, jnp.float32)

        return at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """1 after the warm-up."""

    def decay(self, steps: int) -> optax.Schedule:
        return optax.constant_schedule(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine, from 1 after the warm-up to 0 at the end."""

    def decay(self, steps: int) -> optax.Schedule:
        return optax.cosine_decay_schedule(1.0, steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """From 1 after the warm-up to `end`, linearly or as a power of the fraction that is left."""

    end: float = 0.0
    power: float = 1.0

    def decay(self, steps: int) -> optax.Schedule:
        return optax.polynomial_schedule(1.0, self.end, self.power, steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReciprocalSquareRoot(Schedule):
    """1 / sqrt(1 + steps / timescale): never ends (arXiv 2106.04560); big_vision's rsqrt.

    `shift` is the number of steps made before, in a run that this one continues.
    """

    timescale: float | int = 10_000
    shift: float | int = 0

    def decay(self, steps: int) -> optax.Schedule:
        return lambda count: jax.lax.rsqrt(1.0 + (count + self.shift) / self.timescale)


@runtime_checkable
class Optimizer(Protocol):
    """Turns gradients into directions."""

    def transformation(self, decays: Mapping[str, float]) -> optax.GradientTransformation:
        """Over flat dicts; `decays` are the weight decay's multipliers of the paths with one."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam (arXiv 1412.6980); the first moment is stored as `momentum_dtype`, None as weights."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum_dtype: DType | None = None

    def transformation(self, decays: Mapping[str, float]) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.momentum_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay scaled by the learning rate too (arXiv 1711.05101)."""

    weight_decay: float = 1e-2

    def transformation(self, decays: Mapping[str, float]) -> optax.GradientTransformation:
        scaled = {path: self.weight_decay * factor for path, factor in decays.items()}
        return optax.chain(super().transformation(decays), _add_decay(scaled))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor:
    """big_vision's variant of Adafactor (arXiv 1804.04235; 2106.04560, section 3.4).

    Second moments are factored over the two largest axes where both have `factored_from` entries;
    their decay is 1 - t**-decay_rate, at most `b2_cap`. The momentum is an average without
    correction of its start, None for none. Updates are clipped to `clip_update` root mean square.
    """

    factored_from: int = 32
    decay_rate: float = 0.8
    b2_cap: float = 0.999
    clip_update: float | None = None
    momentum: float | None = 0.9
    momentum_dtype: DType = jnp.bfloat16
    eps: float = 1e-30

    def transformation(self, decays: Mapping[str, float]) -> optax.GradientTransformation:
        def decay(step: Any, exponent: Any) -> jax.Array:
            t = jnp.asarray(step, jnp.float32) + 1.0
            return jnp.minimum(self.b2_cap, 1.0 - t ** (-exponent))

        chain = [
            optax.scale_by_factored_rms(
                decay_rate=self.decay_rate,
                min_dim_size_to_factor=self.factored_from,
                epsilon=self.eps,
                decay_rate_fn=decay,
            )
        ]
        if self.clip_update is not None:
            chain.append(optax.clip_by_block_rms(self.clip_update))
        if self.momentum is not None:
            chain.append(
                optax.ema(self.momentum, debias=False, accumulator_dtype=self.momentum_dtype)
            )
        return optax.chain(*chain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD:
    """Gradient descent; with `momentum` a sum of past gradients, stored as `momentum_dtype`."""

    momentum: float | None = None
    nesterov: bool = False
    momentum_dtype: DType | None = None

    def transformation(self, decays: Mapping[str, float]) -> optax.GradientTransformation:
        if self.momentum is None:
            return optax.identity()
        return optax.trace(self.momentum, self.nesterov, self.momentum_dtype)


KERNELS = Rules(((".*/kernel", 1.0),))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How gradients become updates.

    Attributes:
      learning_rate: peak.
      optimizer: turns gradients into directions.
      schedules: the learning rate's factor by path; None freezes. Every parameter needs one.
      lr_multipliers: further factors on the learning rate by path.
      weight_decay: added fraction of the weights, scaled by the schedule, not the learning rate.
      weight_decay_multipliers: factors on the weight decay by path; other paths do not decay.
      max_grad_norm: the global norm that gradients of trainable weights are scaled down to.
    """

    learning_rate: float
    optimizer: Optimizer = Adam()
    schedules: Rules[Schedule | None] = Rules(((".*", Constant()),))
    lr_multipliers: Rules[float] = Rules(())
    weight_decay: float = 0.0
    weight_decay_multipliers: Rules[float] = KERNELS
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if self.weight_decay and isinstance(self.optimizer, AdamW):
            raise ConfigError(
                f"expected one weight decay, got weight_decay={self.weight_decay} and AdamW, which "
                "has its own. Write AdamW(weight_decay=...) alone"
            )
        frozen = [path for path, factor in self.lr_multipliers.rules if not factor > 0]
        if frozen:
            raise ConfigError(
                f"expected positive lr_multipliers, got others for {', '.join(frozen)}. "
                f"A schedule of None freezes: schedules=Rules((({frozen[0]!r}, None), ...))"
            )

    def trainable(self, paths: Iterable[str]) -> tuple[str, ...]:
        """The paths that are not frozen, of all the model's, sorted."""
        chosen = self.schedules.cover(paths, "schedules")
        return tuple(sorted(path for path, schedule in chosen.items() if schedule is not None))


def make_optimizer(
    config: OptimizerConfig, paths: Iterable[str], run: RunLength
) -> optax.GradientTransformation:
    """The chain, over a flat dict of exactly the trainable ones of all the model's `paths`.

    Raises ConfigError if a path has no schedule, a rule matches none, or all are frozen.
    """
    paths = list(paths)
    schedules = {k: s for k, s in config.schedules.cover(paths, "schedules").items() if s}
    if not schedules:
        raise ConfigError(
            "expected at least one trainable parameter, got none: every one is frozen. Write for "
            'example schedules=Rules((("llm/.*", Cosine()), (".*", None)))'
        )
    multipliers = config.lr_multipliers.find(paths, "lr_multipliers")
    rates = {path: config.learning_rate * multipliers.get(path, 1.0) for path in schedules}
    decays: dict[str, float] = {}
    if config.weight_decay or isinstance(config.optimizer, AdamW):
        if config.weight_decay_multipliers == KERNELS:  # the default need not match any path
            found = {path: 1.0 for path in paths if path.endswith("/kernel")}
        else:
            found = config.weight_decay_multipliers.find(paths, "weight_decay_multipliers")
        decays = {path: factor for path, factor in found.items() if path in schedules and factor}
    factors = {s: s.factor(run) for s in dict.fromkeys(schedules.values())}
    by_path = {path: factors[s] for path, s in schedules.items()}
    added = {path: config.weight_decay * f for path, f in decays.items()}
    chain = [] if config.max_grad_norm is None else [_clip(config.max_grad_norm)]
    chain += [config.optimizer.transformation(decays), _descend(rates, added, by_path)]
    return optax.chain(*chain)


def _clip(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of at most `max_norm`.

    By one factor, where `optax.clip_by_global_norm` divides by the norm: XLA holds the quotients
    beside the gradients, as much memory as the trained weights take once more.
    """

    def clip(updates: Any, params: Any) -> Any:
        norm = global_norm(updates)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return {k: (u * factor).astype(u.dtype) for k, u in updates.items()}

    return optax.stateless(clip)


def global_norm(tree: Any) -> jax.Array:
    """Root of the sum of all squares, f32[]."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def _add_decay(decays: Mapping[str, float]) -> optax.GradientTransformation:
    def add(updates: Any, params: Any) -> Any:
        return {
            k: u + decays[k] * params[k].astype(u.dtype) if decays.get(k) else u
            for k, u in updates.items()
        }

    return optax.stateless(add)


def _descend(
    rates: Mapping[str, float],
    decays: Mapping[str, float],
    factors: Mapping[str, optax.Schedule],
) -> optax.GradientTransformation:
    """-schedule * (learning rate * update + weight decay * weights), at the number of updates."""
    decay = _add_decay(decays)

    def init(params: Any) -> Any:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        now: dict[Any, Any] = {f: f(state.count) for f in dict.fromkeys(factors.values())}
        scaled: Any = {k: u * rates[k] for k, u in updates.items()}
        scaled, _ = decay.update(scaled, optax.EmptyState(), params)
        scaled = {k: (u * -now[factors[k]]).astype(u.dtype) for k, u in scaled.items()}
        count: Any = optax.safe_increment(state.count)
        return scaled, optax.ScaleByScheduleState(count)

    return optax.GradientTransformation(init, update)
