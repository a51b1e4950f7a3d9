"""Layers of one kind stacked on a leading axis: initialised by vmap, run by scan."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Layer = TypeVar("Layer", bound=nnx.Module)
Carry = TypeVar("Carry")


def stack_layers(make: Callable[[nnx.Rngs], Layer], depth: int, rngs: nnx.Rngs) -> Layer:
    """One module whose every parameter has a leading axis of `depth`."""
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(keys)


def scan_layers(
    layers: nnx.Module, apply: Callable[[Any, Carry, jax.Array], Carry], carry: Carry
) -> Carry:
    """Folds `apply(layer, carry, index)` over the stacked layers, first to last."""
    graphdef, params = nnx.split(layers)
    depth = jax.tree.leaves(params)[0].shape[0]

    def step(carry: Carry, xs: tuple[Any, jax.Array]) -> tuple[Carry, None]:
        layer_params, index = xs
        return apply(nnx.merge(graphdef, layer_params), carry, index), None

    return jax.lax.scan(step, carry, (params, jnp.arange(depth)))[0]
