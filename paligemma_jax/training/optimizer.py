"""The optimizer: big_vision's chain, in its order and with its meaning of weight decay.

    clip by global norm -> method -> * learning rate -> + decay * weights -> * schedule -> * -1

So weight decay is scaled by the schedule but not by the learning rate: 0.1 in the convention of
`optax.adamw` and PyTorch is `weight_decay=0.1 * learning_rate` here, or `AdamW(weight_decay=0.1)`.

By default only paths ".*/kernel" decay, as in big_vision: exactly the eight matrices of the image
encoder (patch embedding, attention's four, the MLP's two, head). No weight of Gemma is called
kernel, neither here (`w`) nor there (`w`, `gating_einsum`, `linear`), so none of its weights decays
unless a rule says so.

Factors on the learning rate by step: big_vision's schedules, with warm-up and cool-down.

A schedule goes from 0 to 1 and multiplies the learning rate and the weight decay. Step 0 is the
first update, so that a warm-up's first update is exactly zero, as in big_vision.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.layers import DType
from paligemma_jax.models.sharding import Rules

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


KERNELS = Rules(((".*/kernel", 1.0),))


@runtime_checkable
class Method(Protocol):
    """Turns gradients into directions."""

    def transformation(self, decays: Mapping[str, float]) -> optax.GradientTransformation:
        """Over flat dicts; `decays` are the weight decay's factors of the paths that have one."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam (arXiv 1412.6980); the first moment is stored as `momentum_dtype`, None as weights."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum_dtype: DType | None = None

    def transformation(self, decays: Mapping[str, float]) -> optax.GradientTransformation:
        """See `Method`."""
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.momentum_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay scaled by the learning rate too (arXiv 1711.05101)."""

    weight_decay: float = 1e-2

    def transformation(self, decays: Mapping[str, float]) -> optax.GradientTransformation:
        """See `Method`."""
        adam = super().transformation(decays)
        return optax.chain(
            adam, _add_weights({k: self.weight_decay * v for k, v in decays.items()})
        )


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
        """See `Method`."""

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
        """See `Method`."""
        if self.momentum is None:
            return optax.identity()
        return optax.trace(self.momentum, self.nesterov, self.momentum_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What makes an update.

    Attributes:
      learning_rate: peak.
      method: what turns gradients into directions.
      schedules: the learning rate's factor by path; None freezes. Every parameter needs one.
      rate_factors: further factors on the learning rate by path, where there are any.
      weight_decay: added share of the weights, scaled by the schedule, not by the learning rate.
      decays: factors on the weight decay by path; paths without do not decay.
      clip_norm: the global norm that gradients of trainable weights are scaled down to.
    """

    learning_rate: float
    method: Method = Adam()
    schedules: Rules[Schedule | None] = Rules(((".*", Constant()),))
    rate_factors: Rules[float] = Rules(())
    weight_decay: float = 0.0
    decays: Rules[float] = KERNELS
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if self.weight_decay and isinstance(self.method, AdamW):
            raise ConfigError(
                f"weight_decay={self.weight_decay} does not go with AdamW, which has its own. One "
                "of the two fits. Write AdamW(weight_decay=...) alone"
            )
        frozen = [p for p, factor in self.rate_factors.rules if not factor > 0]
        if frozen:
            raise ConfigError(
                f"rate_factors must be positive, but those of {', '.join(frozen)} are not. "
                f"A schedule of None freezes. Write schedules=Rules((({frozen[0]!r}, None), ...))"
            )

    def trainable(self, paths: Iterable[str]) -> tuple[str, ...]:
        """The paths that are not frozen, of all the model's, sorted."""
        chosen = self.schedules.cover(paths, "schedules")
        return tuple(sorted(path for path, schedule in chosen.items() if schedule is not None))

    def rates(self, paths: Iterable[str], run: Run) -> dict[str, Factor]:
        """The learning rate by rule, as functions of the step; without `rate_factors`."""

        def rate(factor: Factor) -> Factor:
            return lambda step: self.learning_rate * factor(step)

        self.trainable(paths)
        return {
            pattern: rate(schedule.factor(run))
            for pattern, schedule in self.schedules.rules
            if schedule is not None
        }


def make_optimizer(
    config: OptimizerConfig, paths: Iterable[str], run: Run
) -> optax.GradientTransformation:
    """The chain, over a flat dict of exactly the trainable ones of all the model's `paths`.

    Raises ConfigError if a path has no schedule, a rule matches none, or all are frozen.
    """
    paths = list(paths)
    trainable = config.trainable(paths)
    if not trainable:
        raise ConfigError(
            "Every parameter is frozen. At least one with a schedule fits. Write for example "
            'schedules=Rules((("llm/.*", Cosine()), (".*", None)))'
        )
    schedules = config.schedules.cover(paths, "schedules")
    factors = config.rate_factors.find(paths, "rate_factors")
    decay = config.weight_decay
    decays = _decays(config, paths, trainable)
    made = {s: s.factor(run) for s in dict.fromkeys(schedules.values()) if s is not None}
    by_path = {path: made[s] for path, s in schedules.items() if s is not None}
    chain = [] if config.clip_norm is None else [_clip(config.clip_norm)]
    chain.append(config.method.transformation(decays))
    chain.append(_scale({p: config.learning_rate * factors.get(p, 1.0) for p in trainable}))
    if decay:
        chain.append(_add_weights({path: decay * factor for path, factor in decays.items()}))
    chain.append(_scale_by_schedules(by_path))
    return optax.chain(*chain)


def _decays(
    config: OptimizerConfig, paths: Iterable[str], trainable: tuple[str, ...]
) -> dict[str, float]:
    """Factors on the weight decay of the trainable weights that have one."""
    if not config.weight_decay and not isinstance(config.method, AdamW):
        return {}
    if config.decays == KERNELS:  # need not match: the default must fit every model
        return {path: 1.0 for path in trainable if path.endswith("/kernel")}
    chosen = config.decays.find(paths, "decays")
    return {path: factor for path, factor in chosen.items() if path in trainable and factor}


def _clip(most: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of at most `most`.

    By one factor, where `optax.clip_by_global_norm` divides by the norm: what a division gives, XLA
    holds beside the gradients, as much memory as the trained weights take once more.
    """

    def clip(updates: Any, params: Any) -> Any:
        squares = [jnp.sum(jnp.square(u.astype(jnp.float32))) for u in updates.values()]
        norm = jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))
        factor = jnp.where(norm < most, 1.0, most / norm)
        return {k: (u * factor).astype(u.dtype) for k, u in updates.items()}

    return optax.stateless(clip)


def _scale(factors: Mapping[str, float]) -> optax.GradientTransformation:
    def scale(updates: Any, params: Any) -> Any:
        return {k: u * factors[k] for k, u in updates.items()}

    return optax.stateless(scale)


def _add_weights(decays: Mapping[str, float]) -> optax.GradientTransformation:
    def add(updates: Any, params: Any) -> Any:
        return {
            k: u + decays[k] * params[k].astype(u.dtype) if k in decays else u
            for k, u in updates.items()
        }

    return optax.stateless(add)


def _scale_by_schedules(factors: Mapping[str, Factor]) -> optax.GradientTransformation:
    """Scales down the slope: by minus each path's factor at the number of updates made before."""

    def init(params: Any) -> Any:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        now = {factor: factor(state.count) for factor in dict.fromkeys(factors.values())}
        scaled = {k: (u * -now[factors[k]]).astype(u.dtype) for k, u in updates.items()}
        count: Any = optax.safe_increment(state.count)
        return scaled, optax.ScaleByScheduleState(count)

    return optax.GradientTransformation(init, update)
