"""All that a training step reads and replaces."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from paligemma_jax.models.layers import DType


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
