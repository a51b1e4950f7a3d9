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


def fold_layers(
    layers: nnx.Module, apply: Callable[[Any, Carry, jax.Array], Carry], carry: Carry
) -> Carry:
    """`scan_layers` where no gradient is wanted: one layer's weights are widened at a time.

    XLA on CPUs multiplies bfloat16 by widening it to float32, and moves that out of the loop: 12 GB
    more for a model of 3B parameters. The barrier keeps it inside. Elsewhere, and in float32, this
    is `scan_layers`.
    """
    graphdef, params = nnx.split(layers)
    leaves = jax.tree.leaves(params)
    if jax.default_backend() != "cpu" or all(leaf.dtype.itemsize >= 4 for leaf in leaves):
        return scan_layers(layers, apply, carry)

    def step(carry: Carry, index: jax.Array) -> tuple[Carry, None]:
        carry, inside = jax.lax.optimization_barrier((carry, params))
        layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, 0, False), inside)
        return apply(nnx.merge(graphdef, layer), carry, index), None

    return jax.lax.scan(step, carry, jnp.arange(leaves[0].shape[0]))[0]
