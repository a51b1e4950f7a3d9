"""Layers of one kind, one after the other: stacked on a leading axis, or each by itself.

Stacked ones are initialised by vmap and run by scan: small programs, for training. Those in an
`nnx.List` are run one by one, each with its weights where they lie. That is for inference, since a
scan copies every weight out of the stack before it is used, which takes as long as reading it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from paligemma_jax.models.backend import on_cpu
from paligemma_jax.models.masks import Layer
from paligemma_jax.models.remat import KeepAll, Remat

Module = TypeVar("Module", bound=nnx.Module)
Carry = TypeVar("Carry")
KEEP_ALL = KeepAll()


def stack_layers(make: Callable[[nnx.Rngs], Module], depth: int, rngs: nnx.Rngs) -> Module:
    """One module whose every parameter has a leading axis of `depth`."""
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(keys)


def scan_layers(
    layers: nnx.Module,
    apply: Callable[[Any, Carry, Layer], Carry],
    carry: Carry,
    remat: Remat = KEEP_ALL,
) -> Carry:
    """Folds `apply(layer, carry, index)` over the layers, first to last.

    `remat` says what of each is kept for its gradient.
    """
    if isinstance(layers, nnx.List):
        for index, layer in enumerate(layers):
            carry = remat.wrap(_one(apply, layer, index), scanned=False)(carry)
        return carry
    graphdef, params = nnx.split(layers)
    depth = jax.tree.leaves(params)[0].shape[0]

    def step(carry: Carry, xs: tuple[Any, jax.Array]) -> tuple[Carry, None]:
        layer_params, index = xs
        return apply(nnx.merge(graphdef, layer_params), carry, index), None

    body = remat.wrap(step, scanned=True)
    return jax.lax.scan(body, carry, (params, jnp.arange(depth)))[0]


def _one(
    apply: Callable[[Any, Carry, Layer], Carry], layer: nnx.Module, index: int
) -> Callable[[Carry], Carry]:
    return lambda carry: apply(layer, carry, index)


def fold_layers(
    layers: nnx.Module, apply: Callable[[Any, Carry, Layer], Carry], carry: Carry
) -> Carry:
    """`scan_layers` where no gradient is wanted: one layer's weights are widened at a time.

    XLA on CPUs multiplies bfloat16 by widening it to float32, and moves that out of the loop: 12 GB
    more for a model of 3B parameters. The barrier keeps it inside. Elsewhere, and in float32, this
    is `scan_layers`.
    """
    if isinstance(layers, nnx.List):
        return scan_layers(layers, apply, carry)
    graphdef, params = nnx.split(layers)
    leaves = jax.tree.leaves(params)
    if not on_cpu() or all(leaf.dtype.itemsize >= 4 for leaf in leaves):
        return scan_layers(layers, apply, carry)

    def step(carry: Carry, index: jax.Array) -> tuple[Carry, None]:
        carry, inside = jax.lax.optimization_barrier((carry, params))
        layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, 0, False), inside)
        return apply(nnx.merge(graphdef, layer), carry, index), None

    return jax.lax.scan(step, carry, jnp.arange(leaves[0].shape[0]))[0]
