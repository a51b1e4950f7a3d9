"""One training step: loss, gradient of the trainable weights, update, and what there is to report.

Letters: B batch, T text tokens (one more than the model is given), M microbatches.

Suffix losses with big_vision's semantics, without a one-hot of vocabulary size.

Letters: B batch, T tokens, V vocabulary.

The loss of hidden states, without ever holding the logits of a whole batch.

Only supervised positions are multiplied by the token table, some columns of all rows at a time, and
a gradient computes those logits again. So memory is that of a few columns: B * columns * V floats.

Letters: B batch, T tokens, S columns of supervised tokens, W width, V vocabulary.

All that a training step reads and replaces.

What happens when the loss is no number, or explodes.
"""

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Num

from paligemma_jax.errors import ConfigError, PaliGemmaError
from paligemma_jax.models.layers import Dropout, DType, Remat
from paligemma_jax.models.lora import with_dropout
from paligemma_jax.models.paligemma import GraphDef, PaliGemma
from paligemma_jax.processing.processor import Batch


def token_nll(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], label_smoothing: float = 0.0
) -> Float[Array, "*B"]:
    """Cross-entropy in nats; smoothing spreads over the V - 1 other classes (big_vision 4.1)."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    on_target = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    if not label_smoothing:
        return -on_target
    other = label_smoothing / (logits.shape[-1] - 1)
    return -((1.0 - label_smoothing - other) * on_target + other * jnp.sum(logp, axis=-1))


def per_example_loss(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    mask_loss: Num[Array, "B T"],
    label_smoothing: float = 0.0,
) -> Float[Array, " B"]:
    """Mean over each example's supervised tokens, in nats; the batch loss is the mean of these."""
    nll = token_nll(logits, targets, label_smoothing) * mask_loss
    return jnp.sum(nll, axis=1) / jnp.maximum(jnp.sum(mask_loss, axis=1), 1)


Mean = Callable[[jax.Array, jax.Array | None], jax.Array]
Logits = Callable[[jax.Array], jax.Array]


def example_mean(
    mask_loss: Num[Array, "B T"], row_mask: Bool[Array, " B"] | None = None
) -> Float[Array, "B T"]:
    """Weights for the mean over examples of the mean over their tokens: big_vision's.

    An example without supervised tokens counts, with a loss of zero; a row that only fills the
    batch (`row_mask` False) does not.
    """
    mask = _real(mask_loss, row_mask)
    rows = mask.shape[0] if row_mask is None else jnp.maximum(jnp.sum(row_mask), 1)
    return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1) / rows


def token_mean(
    mask_loss: Num[Array, "B T"], row_mask: Bool[Array, " B"] | None = None
) -> Float[Array, "B T"]:
    """Weights for the mean over all supervised tokens, so that long answers count more."""
    mask = _real(mask_loss, row_mask)
    return mask / jnp.maximum(jnp.sum(mask), 1)


def _real(mask_loss: jax.Array, row_mask: jax.Array | None) -> jax.Array:
    mask = mask_loss.astype(jnp.float32)
    return mask if row_mask is None else mask * row_mask[:, None]


def weighted_loss(
    logits: Logits,
    hidden: Float[Array, "B T W"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    label_smoothing: float = 0.0,
    columns: int = 32,
    most: int | None = None,
) -> Float[Array, ""]:
    """Sum of `weights` times cross-entropy in nats; positions of weight zero add nothing.

    `logits` is the output head, f[B, S, W] -> f32[B, S, V]; it sees `columns` tokens of each row at
    a time. `most` bounds how many a row has with a weight, and no others are looked at; a row with
    more makes the loss NaN, for nothing may be left out in silence.
    """
    length = targets.shape[1]
    size = length if most is None else min(most, length)
    if size < length:  # the supervised ones first, in their order
        place = jnp.argsort(weights == 0, axis=1, stable=True)
        cut = jnp.sum(weights != 0, axis=1) > size
        weights = jnp.where(jnp.any(cut), jnp.nan, jnp.take_along_axis(weights, place, axis=1))
        hidden = jnp.take_along_axis(hidden, place[:, :size, None], axis=1)
        targets = jnp.take_along_axis(targets, place[:, :size], axis=1)
        weights = weights[:, :size]

    @jax.checkpoint
    def loss(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(token_nll(logits(hidden), targets, label_smoothing) * weights)

    if size <= columns:
        return loss(hidden, targets, weights)

    # Not skipped where nothing is supervised: `lax.cond` would keep a copy of the table a chunk.
    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + loss(*chunk), None

    chunks = tuple(_chunks(x, columns) for x in (hidden, targets, weights))
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)[0]


def _chunks(x: jax.Array, columns: int) -> jax.Array:
    """[B, S, ...] -> [chunks, B, columns, ...], padded with zeros."""
    rows, size = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, -size % columns), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(rows, -1, columns, *x.shape[2:]), 1, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A run between two steps.

    Attributes:
      step: i32[], updates made.
      trainable: dict of the master weights by flat path, float32 unless asked otherwise.
      frozen: dict of the other weights by flat path, in the checkpoint's dtype, or quantized.
      opt_state: of the optimizer, over `trainable`.
      ema: dict of the exponential moving averages of `trainable` in float32; None without one.
    """

    # Any, since JAX makes such trees of shapes, shardings and of things of its own.
    step: Any
    trainable: Any
    frozen: Any
    opt_state: Any
    ema: Any = None

    @property
    def params(self) -> dict[str, Any]:
        """Every weight by flat path."""
        return self.trainable | self.frozen


def init_state(
    params: Mapping[str, jax.Array],
    trainable: Collection[str],
    optimizer: optax.GradientTransformation,
    *,
    dtype: DType = jnp.float32,
    ema: bool = False,
) -> TrainState:
    """The state before the first step, of weights by flat path.

    `dtype` is that of the master weights, and so of the optimizer's state. Weights that have it
    already are taken over without a copy, and the first step gives their memory away. Can be traced
    (`jax.eval_shape`).
    """
    master = {path: jnp.asarray(params[path], dtype) for path in sorted(trainable)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=master,
        frozen={path: leaf for path, leaf in params.items() if path not in master},
        opt_state=optimizer.init(master),
        # A copy even in float32: two donated arguments may not share their memory.
        ema={k: jnp.array(v, jnp.float32, copy=True) for k, v in master.items()} if ema else None,
    )


Params = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skip:
    """Leaves out updates whose loss or gradient is not finite, or whose gradient is too large."""

    grad_norm_above: float = float("inf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How a step is computed.

    Attributes:
      mean: `example_mean` (big_vision's) or `token_mean`.
      label_smoothing: probability spread over the other tokens of the vocabulary.
      dropout: of the decoder, as in big_vision.
      microbatches: parts that a batch goes through in, one after the other; same result.
      remat: what of a layer is kept for its gradient.
      ema: share of the average that stays at each step; None keeps no average.
      skip: which updates to leave out; None leaves out none.
      logit_columns: supervised tokens of each row whose logits are held at a time.
      most_supervised: bound on a row's supervised tokens, see `weighted_loss`.
    """

    mean: Mean = example_mean
    label_smoothing: float = 0.0
    dropout: float = 0.0
    microbatches: int = 1
    remat: Remat = "full"
    ema: float | None = None
    skip: Skip | None = None
    logit_columns: int = 32
    most_supervised: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 <= self.label_smoothing < 1.0:
            problems.append(f"label_smoothing is {self.label_smoothing}, must be in [0, 1)")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout is {self.dropout}, must be in [0, 1)")
        if self.ema is not None and not 0.0 <= self.ema < 1.0:
            problems.append(f"ema is {self.ema}, must be None or in [0, 1)")
        sizes = (self.microbatches, self.logit_columns, self.most_supervised or 1)
        if min(sizes) < 1:
            problems.append("microbatches, logit_columns and most_supervised must be positive")
        if problems:
            raise ConfigError("StepConfig is inconsistent: " + "; ".join(problems) + ".")


def batch_loss(
    model: PaliGemma, batch: Batch, weights: jax.Array, config: StepConfig, key: jax.Array
) -> jax.Array:
    """The loss f32[] of a training batch, teacher forced; `weights` f32[B, T-1] from a `Mean`."""
    tokens, mask_ar = jnp.asarray(batch.tokens), jnp.asarray(batch.mask_ar)
    if batch.images is None:
        width = model.config.llm.width
        image_tokens = jnp.zeros((tokens.shape[0], 0, width), model.dtype)
    else:
        image_tokens = model.encode_images(jnp.asarray(batch.images), config.remat)
    dropout = Dropout(key, config.dropout) if config.dropout else None
    hidden = model.hidden(image_tokens, tokens[:, :-1], mask_ar[:, :-1], dropout, config.remat)
    return weighted_loss(
        model.llm.logits,
        hidden,
        tokens[:, 1:],
        weights,
        label_smoothing=config.label_smoothing,
        columns=config.logit_columns,
        most=config.most_supervised,
    )


def loss_and_gradient(
    graphdef: GraphDef,
    trainable: Params,
    frozen: Mapping[str, Any],
    batch: Batch,
    config: StepConfig,
    key: jax.Array,
) -> tuple[jax.Array, Params]:
    """The batch's loss and its gradient in the trainable weights, in their dtype."""
    row_mask = None if batch.row_mask is None else jnp.asarray(batch.row_mask)
    weights = config.mean(_supervised(batch), row_mask)
    parts = config.microbatches

    def loss(trainable: Params, batch: Batch, weights: jax.Array, key: jax.Array) -> jax.Array:
        of_decoder, of_adapters = jax.random.split(key)
        model = with_dropout(graphdef.merge_flat({**frozen, **trainable}), of_adapters)
        return batch_loss(model, batch, weights, config, of_decoder)

    gradient = jax.value_and_grad(loss)
    if parts == 1:
        return gradient(trainable, batch, weights, key)
    rows = batch.tokens.shape[0]
    if rows % parts:
        raise ConfigError(
            f"A batch of {rows} rows does not go into {parts} microbatches. A number that divides "
            f"{rows} fits. Write microbatches={max(n for n in range(1, parts) if rows % n == 0)}"
        )

    def split(x: Any) -> jax.Array:
        # Every parts-th row, so that a batch that is sharded by blocks of rows stays where it is.
        return jnp.swapaxes(jnp.reshape(x, (rows // parts, parts, *x.shape[1:])), 0, 1)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        number, batch, weights = part
        one = gradient(trainable, batch, weights, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, one), None

    # The weights come from the whole batch, so sums of parts are exact whatever the mean.
    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable))
    xs = (jnp.arange(parts), jax.tree.map(split, batch), split(weights))
    return jax.lax.scan(add, zero, xs)[0]


def _supervised(batch: Batch) -> jax.Array:
    """i32[B, T-1]: the targets to learn."""
    if batch.mask_loss is None:
        raise ConfigError(
            "The batch has no mask_loss, so there is nothing to learn. Batches for training fit. "
            "Encode examples with Processor.encode_train(prefix, suffix, length)"
        )
    return jnp.asarray(batch.mask_loss)[:, 1:]


class TrainStep:
    """The compiled step; see `make_train_step`."""

    def __init__(
        self,
        graphdef: GraphDef,
        optimizer: optax.GradientTransformation,
        config: StepConfig,
        shardings: TrainState | None,
    ):
        self._graphdef, self._optimizer, self._config = graphdef, optimizer, config
        out = None if shardings is None else (dataclasses.replace(shardings, frozen={}), None)
        self._compiled = jax.jit(self._step, donate_argnums=0, static_argnums=4, out_shardings=out)

    def __call__(
        self, state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """The state after one more step, and its metrics."""
        moving, metrics = self._compiled(*self._arguments(state, batch, key))
        return dataclasses.replace(moving, frozen=state.frozen), metrics

    def lower(self, state: TrainState, batch: Batch, key: Any) -> jax.stages.Lowered:
        """The program, from arrays or shapes; `.compile()` tells its memory and cost."""
        return self._compiled.lower(*self._arguments(state, batch, key))

    def _arguments(self, state: TrainState, batch: Batch, key: Any) -> tuple[Any, ...]:
        # The frozen weights go apart: they are not given away.
        moving = dataclasses.replace(state, frozen={})
        return moving, state.frozen, batch, key, most_supervised(batch, self._config)

    def _step(
        self, moving: TrainState, frozen: Params, batch: Batch, key: jax.Array, most: int | None
    ) -> tuple[TrainState, Metrics]:
        config = dataclasses.replace(self._config, most_supervised=most)
        key = jax.random.fold_in(key, moving.step)
        loss, grads = loss_and_gradient(
            self._graphdef, moving.trainable, frozen, batch, config, key
        )
        updates, opt_state = self._optimizer.update(grads, moving.opt_state, moving.trainable)
        trainable: Any = optax.apply_updates(moving.trainable, updates)
        norm = _norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        ema = _average(moving.ema, trainable, config.ema)
        after = dataclasses.replace(moving, trainable=trainable, opt_state=opt_state, ema=ema)
        taken = jnp.ones((), bool)
        if config.skip is not None:
            taken = finite & (norm <= config.skip.grad_norm_above)
            after = jax.tree.map(lambda new, old: jnp.where(taken, new, old), after, moving)
        counts = jnp.sum(_supervised(batch), axis=1).astype(jnp.float32)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "param_norm": _norm(after.trainable),
            "update_norm": jnp.where(taken, _norm(updates), 0.0),
            "supervised_mean": jnp.mean(counts),
            "supervised_max": jnp.max(counts),
            "not_finite": 1.0 - finite.astype(jnp.float32),
            "skipped": 1.0 - taken.astype(jnp.float32),
        }
        return dataclasses.replace(after, step=moving.step + 1), metrics


def make_train_step(
    graphdef: GraphDef,
    optimizer: optax.GradientTransformation,
    config: StepConfig = StepConfig(),  # noqa: B008
    *,
    shardings: TrainState | None = None,
) -> TrainStep:
    """The compiled step, (state, batch, key) -> (state, metrics).

    The state is given away, its frozen weights apart. The batch is as `Processor.encode_train`
    makes it: T is one longer than what the model is given. The key is the run's; each step makes
    its own of it. `shardings` of the state hold for what comes out too.

    A batch of numpy arrays tells how many supervised tokens its rows have, and a program is made
    for each multiple of `logit_columns`; otherwise `most_supervised` says it, or all T count.

    Metrics, f32[]: loss; grad_norm (before clipping), param_norm, update_norm, of the trainable
    weights; supervised_mean and supervised_max, tokens a row; not_finite, 1 if the loss or the
    gradient is not; skipped, 1 if there was no update (the optimizer's own count of updates, which
    schedules go by, then stays too).
    """
    return TrainStep(graphdef, optimizer, config, shardings)


def most_supervised(batch: Batch, config: StepConfig) -> int | None:
    """The bound on a row's supervised tokens, as tight as can be told without asking a device."""
    if config.most_supervised is not None or not isinstance(batch.mask_loss, np.ndarray):
        return config.most_supervised
    longest = max(int(np.count_nonzero(batch.mask_loss[:, 1:], axis=1).max()), 1)
    return -(-longest // config.logit_columns) * config.logit_columns


def _norm(tree: Any) -> jax.Array:
    """Root of the sum of all squares, f32[]."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def _average(ema: Params | None, params: Any, share: float | None) -> Params | None:
    if ema is None or share is None:
        return ema
    return {k: share * v + (1.0 - share) * params[k].astype(v.dtype) for k, v in ema.items()}


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
