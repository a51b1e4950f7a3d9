"""One training step: loss, gradient of the trainable weights, update, and what there is to report.

Letters: B batch, T text tokens (one more than the model is given), M microbatches.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paligemma_jax.errors import ConfigError
from paligemma_jax.models.dropout import Dropout
from paligemma_jax.models.lora import with_dropout
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.models.remat import KeepInputs, Remat
from paligemma_jax.models.skeleton import Skeleton
from paligemma_jax.processing.batch import Batch
from paligemma_jax.training.objective import Mean, example_mean, weighted_loss
from paligemma_jax.training.state import TrainState

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
    remat: Remat = KeepInputs()
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
    skeleton: Skeleton,
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
        model = with_dropout(skeleton.fill({**frozen, **trainable}), of_adapters)
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
        skeleton: Skeleton,
        optimizer: optax.GradientTransformation,
        config: StepConfig,
        shardings: TrainState | None,
    ):
        self._skeleton, self._optimizer, self._config = skeleton, optimizer, config
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
            self._skeleton, moving.trainable, frozen, batch, config, key
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
    skeleton: Skeleton,
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
    return TrainStep(skeleton, optimizer, config, shardings)


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
