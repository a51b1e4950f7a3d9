"""One training step: loss, gradient of the trainable weights, update, metrics, divergence guard.

The loss has big_vision's semantics and never holds the logits of a whole batch: only supervised
positions are multiplied by the embedding table, a chunk of columns at a time, and the gradient
computes those logits again.

Letters: B batch, T text tokens (targets: one less), S tokens of a chunk, W width, V vocabulary.
"""

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from paligemma_jax.training.optimizer import global_norm

Params = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# The loss of one's own: of (model, batch, number of updates made before), with more metrics.
LossFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How a step is computed.

    Attributes:
      loss_reduction: "example", the mean over examples of the mean over their tokens (big_vision's;
        one without targets counts, with a loss of zero), or "token", the mean over all targets.
      label_smoothing: probability spread over the other tokens of the vocabulary.
      dropout: of the decoder, as in big_vision.
      gradient_accumulation_steps: parts that a batch is processed in, in turn; same result.
      remat: what of a layer is kept for its gradient.
      ema: decay of the exponential moving average of the weights; None keeps no average.
      skip_nonfinite: leave out updates whose loss or gradient is not finite.
      logit_chunk: target tokens of each sequence whose logits are held at a time.
      max_targets: bound on a sequence's target tokens, see `chunked_loss`.
    """

    loss_reduction: str = "example"
    label_smoothing: float = 0.0
    dropout: float = 0.0
    gradient_accumulation_steps: int = 1
    remat: Remat = "full"
    ema: float | None = None
    skip_nonfinite: bool = False
    logit_chunk: int = 32
    max_targets: int | None = None

    def __post_init__(self) -> None:
        fractions = dict(label_smoothing=self.label_smoothing, dropout=self.dropout, ema=self.ema)
        problems = [
            f"{name} in [0, 1), got {value}"
            for name, value in fractions.items()
            if value is not None and not 0.0 <= value < 1.0
        ]
        if self.loss_reduction not in ("example", "token"):
            problems.append(f'loss_reduction "example" or "token", got {self.loss_reduction!r}')
        for name in ("gradient_accumulation_steps", "logit_chunk", "max_targets"):
            if (value := getattr(self, name)) is not None and value < 1:
                problems.append(f"{name} of at least 1, got {value}")
        if problems:
            raise ConfigError(f"expected {'; '.join(problems)}")


def token_nll(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], label_smoothing: float = 0.0
) -> Float[Array, "*B"]:
    """Cross-entropy in nats; smoothing spreads over the V - 1 other classes, as in big_vision."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    on_target = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    if not label_smoothing:
        return -on_target
    other = label_smoothing / (logits.shape[-1] - 1)
    return -((1.0 - label_smoothing - other) * on_target + other * jnp.sum(logp, axis=-1))


def loss_weights(
    mask_loss: Num[Array, "B T"],
    example_mask: Bool[Array, " B"] | None = None,
    reduction: str = "example",
) -> Float[Array, "B T"]:
    """Weights of target tokens whose weighted sum is the loss; see `StepConfig.loss_reduction`.

    Examples that only fill the batch (`example_mask` False) do not count.
    """
    mask = mask_loss.astype(jnp.float32)
    if example_mask is not None:
        mask = mask * example_mask[:, None]
    if reduction == "token":
        return mask / jnp.maximum(jnp.sum(mask), 1)
    count = mask.shape[0] if example_mask is None else jnp.maximum(jnp.sum(example_mask), 1)
    return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1) / count


def chunked_loss(
    logits: Callable[[jax.Array], jax.Array],
    hidden: Float[Array, "B T W"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    label_smoothing: float = 0.0,
    chunk: int = 32,
    max_targets: int | None = None,
) -> Float[Array, ""]:
    """Sum of `weights` times cross-entropy in nats; positions of weight zero add nothing.

    `logits` is the output head, f[B, S, W] -> f32[B, S, V]; it sees `chunk` tokens of each sequence
    at a time. `max_targets` bounds how many of them have a weight, and no others are computed; a
    sequence with more makes the loss NaN, so that nothing is left out silently.
    """
    length = targets.shape[1]
    size = length if max_targets is None else min(max_targets, length)
    if size < length:  # the targets first, in their order
        order = jnp.argsort(weights == 0, axis=1, stable=True)
        too_many = jnp.sum(weights != 0, axis=1) > size
        weights = jnp.where(jnp.any(too_many), jnp.nan, jnp.take_along_axis(weights, order, axis=1))
        hidden = jnp.take_along_axis(hidden, order[:, :size, None], axis=1)
        targets = jnp.take_along_axis(targets, order[:, :size], axis=1)
        weights = weights[:, :size]

    @jax.checkpoint
    def loss(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(token_nll(logits(hidden), targets, label_smoothing) * weights)

    if size <= chunk:
        return loss(hidden, targets, weights)

    def split(x: jax.Array) -> jax.Array:
        """[B, S, ...] -> [chunks, B, chunk, ...], padded with zeros."""
        x = jnp.pad(x, ((0, 0), (0, -size % chunk), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    # No chunk is skipped: `lax.cond` would keep a copy of the embedding table for each.
    chunks = split(hidden), split(targets), split(weights)
    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(lambda total, part: (total + loss(*part), None), zero, chunks)[0]


def batch_loss(
    model: PaliGemma, batch: Batch, weights: jax.Array, config: StepConfig, key: jax.Array
) -> jax.Array:
    """The loss f32[] of a batch, teacher forced; `weights` f32[B, T-1] from `loss_weights`."""
    tokens, mask_ar = jnp.asarray(batch.tokens), jnp.asarray(batch.mask_ar)
    if batch.images is None:
        width = model.config.llm.width
        image_tokens = jnp.zeros((tokens.shape[0], 0, width), model.dtype)
    else:
        image_tokens = model.encode_images(jnp.asarray(batch.images), config.remat)
    dropout = Dropout(key, config.dropout) if config.dropout else None
    hidden = model.hidden(image_tokens, tokens[:, :-1], mask_ar[:, :-1], dropout, config.remat)
    return chunked_loss(
        model.llm.logits,
        hidden,
        tokens[:, 1:],
        weights,
        label_smoothing=config.label_smoothing,
        chunk=config.logit_chunk,
        max_targets=config.max_targets,
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
    example_mask = None if batch.row_mask is None else jnp.asarray(batch.row_mask)
    weights = loss_weights(target_mask(batch), example_mask, config.loss_reduction)
    parts = config.gradient_accumulation_steps

    def loss(trainable: Params, batch: Batch, weights: jax.Array, key: jax.Array) -> jax.Array:
        of_decoder, of_adapters = jax.random.split(key)
        model = with_dropout(graphdef.merge_flat({**frozen, **trainable}), of_adapters)
        return batch_loss(model, batch, weights, config, of_decoder)

    gradient = jax.value_and_grad(loss)
    if parts == 1:
        return gradient(trainable, batch, weights, key)
    size = batch.tokens.shape[0]
    if size % parts:
        raise ConfigError(
            f"expected gradient_accumulation_steps that divide the batch of {size}, got {parts}"
        )

    def split(x: Any) -> jax.Array:
        # Every parts-th example, so that a batch sharded by blocks of examples stays in place.
        return jnp.swapaxes(jnp.reshape(x, (size // parts, parts, *x.shape[1:])), 0, 1)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        number, batch, weights = part
        one = gradient(trainable, batch, weights, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, one), None

    # The weights come from the whole batch, so that sums of parts are exact.
    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable))
    xs = (jnp.arange(parts), jax.tree.map(split, batch), split(weights))
    return jax.lax.scan(add, zero, xs)[0]


def target_mask(batch: Batch) -> jax.Array:
    """i32[B, T-1]: which tokens after the first are targets."""
    if batch.mask_loss is None:
        raise ConfigError(
            "expected a batch for training, got one without mask_loss. Encode examples with "
            "Processor.encode_train(prefix, suffix, length)"
        )
    return jnp.asarray(batch.mask_loss)[:, 1:]


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

    # Any, since JAX makes such trees of shapes, shardings and of objects of its own.
    step: Any
    trainable: Any
    frozen: Any
    opt_state: Any
    ema: Any = None

    @property
    def params(self) -> dict[str, Any]:
        """Every weight by flat path."""
        return self.trainable | self.frozen

    @property
    def averaged_params(self) -> dict[str, Any]:
        """Every weight by flat path, averaged where there is an EMA."""
        return {**self.params, **(self.ema or {})}


def init_state(
    params: Mapping[str, jax.Array],
    trainable: Collection[str],
    optimizer: optax.GradientTransformation,
    *,
    dtype: DType = jnp.float32,
    ema: bool = False,
) -> TrainState:
    """The state before the first step, of weights by flat path; can be traced by `eval_shape`.

    `dtype` is that of the master weights, and so of the optimizer's state. Weights that have it
    already are taken over without a copy, and the first step donates their memory.
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


class TrainStep:
    """The compiled step, (state, batch, key) -> (state, metrics).

    The state is donated, its frozen weights excepted. The batch is as `Processor.encode_train`
    makes it (T is one longer than what the model is given), or what `loss_fn` takes. The key is the
    run's; each step derives its own. `shardings` of the state hold for what comes out too.

    A batch of numpy arrays tells how many targets its sequences have, and a program is compiled for
    each multiple of `logit_chunk`; otherwise `max_targets` says it, or all T count.

    Metrics, f32[]: loss; grad_norm (before clipping), param_norm, update_norm, of the trainable
    weights; nonfinite_grads, 1 if the loss or the gradient is not finite; skipped, 1 if there was
    no update (the optimizer's own count, which schedules go by, then stays too); without `loss_fn`
    target_tokens_mean and target_tokens_max of a sequence, with it what it returns.
    """

    def __init__(
        self,
        graphdef: GraphDef,
        optimizer: optax.GradientTransformation,
        config: StepConfig = StepConfig(),  # noqa: B008
        *,
        shardings: TrainState | None = None,
        loss_fn: LossFn | None = None,
    ):
        self._graphdef, self._optimizer, self._config = graphdef, optimizer, config
        self._loss_fn = loss_fn
        out = None if shardings is None else (dataclasses.replace(shardings, frozen={}), None)
        self._compiled = jax.jit(self._step, donate_argnums=0, static_argnums=4, out_shardings=out)

    def __call__(self, state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        """The state after one more step, and its metrics."""
        moving, metrics = self._compiled(*self._arguments(state, batch, key))
        return dataclasses.replace(moving, frozen=state.frozen), metrics

    def lower(self, state: TrainState, batch: Any, key: Any) -> jax.stages.Lowered:
        """The program, from arrays or shapes; `.compile()` tells its memory and cost."""
        return self._compiled.lower(*self._arguments(state, batch, key))

    def _arguments(self, state: TrainState, batch: Any, key: Any) -> tuple[Any, ...]:
        # Frozen weights are an argument of their own: they are not donated.
        most = None if self._loss_fn else max_targets(batch, self._config)
        return dataclasses.replace(state, frozen={}), state.frozen, batch, key, most

    def _step(
        self, moving: TrainState, frozen: Params, batch: Any, key: jax.Array, most: int | None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, moving.step)
        if self._loss_fn is None:
            config = dataclasses.replace(self._config, max_targets=most)
            loss, grads = loss_and_gradient(
                self._graphdef, moving.trainable, frozen, batch, config, key
            )
            counts = jnp.sum(target_mask(batch), axis=1).astype(jnp.float32)
            metrics = {"target_tokens_mean": jnp.mean(counts), "target_tokens_max": jnp.max(counts)}
        else:
            loss_fn = self._loss_fn

            def own_loss(trainable: Params) -> tuple[jax.Array, Metrics]:
                model = self._graphdef.merge_flat({**frozen, **trainable})
                return loss_fn(model, batch, moving.step)

            gradient = jax.value_and_grad(own_loss, has_aux=True)
            (loss, metrics), grads = gradient(moving.trainable)
        updates, opt_state = self._optimizer.update(grads, moving.opt_state, moving.trainable)
        trainable: Any = optax.apply_updates(moving.trainable, updates)
        ema, decay = moving.ema, self._config.ema
        if ema is not None and decay is not None:
            ema = {
                k: decay * v + (1.0 - decay) * trainable[k].astype(v.dtype) for k, v in ema.items()
            }
        after = dataclasses.replace(moving, trainable=trainable, opt_state=opt_state, ema=ema)
        norm = global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updated = jnp.ones((), bool)
        if self._config.skip_nonfinite:
            updated = finite
            after = jax.tree.map(lambda new, old: jnp.where(updated, new, old), after, moving)
        metrics = metrics | {
            "loss": loss,
            "grad_norm": norm,
            "param_norm": global_norm(after.trainable),
            "update_norm": jnp.where(updated, global_norm(updates), 0.0),
            "nonfinite_grads": 1.0 - finite.astype(jnp.float32),
            "skipped": 1.0 - updated.astype(jnp.float32),
        }
        return dataclasses.replace(after, step=moving.step + 1), metrics


def max_targets(batch: Batch, config: StepConfig) -> int | None:
    """The bound on a sequence's targets, as tight as can be told without asking a device."""
    if config.max_targets is not None or not isinstance(batch.mask_loss, np.ndarray):
        return config.max_targets
    longest = max(int(np.count_nonzero(batch.mask_loss[:, 1:], axis=1).max()), 1)
    return -(-longest // config.logit_chunk) * config.logit_chunk


BAD_BATCHES = "bad_batches.jsonl"
_RECENT = 50  # steps whose median a loss is compared with
_ENOUGH = 10  # of them before any comparison


class DivergedError(PaliGemmaError):
    """The loss was not finite, or far above what it had been."""


class DivergenceGuard:
    """Looks at every loss in turn, and writes the ids of bad batches to bad_batches.jsonl.

    Attributes:
      max_skipped: updates in a row with a non-finite loss or gradient before the run stops.
      spike_factor: a loss so many times the median of the last 50 counts as bad; None: none does.
      skipped: bad steps so far.
    """

    def __init__(self, workdir: Path, max_skipped: int = 0, spike_factor: float | None = None):
        self.max_skipped, self.spike_factor = max_skipped, spike_factor
        self._path = workdir / BAD_BATCHES
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._in_a_row = 0
        self.skipped = 0

    def state(self) -> dict[str, Any]:
        """What it remembers, for JSON."""
        return {"recent": list(self._recent), "in_a_row": self._in_a_row, "skipped": self.skipped}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from another guard's `state()`; from the start if it is empty."""
        self._recent.clear()
        self._recent.extend(state.get("recent", ()))
        self._in_a_row = state.get("in_a_row", 0)
        self.skipped = state.get("skipped", 0)

    def check(self, step: int, loss: float, grad_norm: float, ids: Sequence[str]) -> None:
        """Takes note of one step; raises DivergedError where the run must stop."""
        problem = self._problem(loss, grad_norm)
        if not problem:
            self._recent.append(loss)
            self._in_a_row = 0
            return
        with self._path.open("a") as file:
            line = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "ids": list(ids)}
            file.write(json.dumps(line) + "\n")
        self._in_a_row += 1
        self.skipped += 1
        if self._in_a_row > self.max_skipped:
            raise DivergedError(
                f"At step {step} {problem} (bad steps in a row: {self._in_a_row}). The ids of its "
                f"examples are in {self._path}; the last checkpoint is from before it. Lower the "
                "learning rate, clip the gradients (max_grad_norm=1.0), or mend the data. To skip "
                "such steps: --config.max_skipped_steps=10"
            )

    def _problem(self, loss: float, grad_norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss was {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm was {grad_norm}"
        if self.spike_factor is not None and len(self._recent) >= _ENOUGH:
            usual = statistics.median(self._recent)
            if loss > self.spike_factor * usual:
                return f"the loss was {loss:.4g}, more than {self.spike_factor:g} times {usual:.4g}"
        return ""
