"""Dropout (JMLR 15, 2014) with a key that is handed on, never stored."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Sets a share of the activations to zero and scales up the others.

    Attributes:
      key: key[], a new one for every step.
      rate: share that is dropped, from 0.0 (nothing happens) to below 1.0.
      shared_axes: axes along which activations are dropped together.
    """

    key: jax.Array
    rate: float = dataclasses.field(metadata=_STATIC)
    shared_axes: tuple[int, ...] = dataclasses.field(default=(), metadata=_STATIC)

    def at(self, place: int | jax.Array) -> "Dropout":
        """The same with the key of one layer, or of one place in a layer."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, place))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if not self.rate:
            return x
        shape = [1 if axis in self.shared_axes else size for axis, size in enumerate(x.shape)]
        kept = jax.random.bernoulli(self.key, 1.0 - self.rate, shape)
        return jnp.where(kept, x / (1.0 - self.rate), jnp.zeros((), x.dtype))
