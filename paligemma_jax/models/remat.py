"""What of a layer's forward pass is kept for its gradient, and what is computed again."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from jax.ad_checkpoint import checkpoint_name

Function = Callable[..., Any]
_PRODUCT = "product"


@runtime_checkable
class Remat(Protocol):
    """A choice between memory and time."""

    def wrap(self, layer: Function, scanned: bool) -> Function:
        """`layer` with the same values and gradients; `scanned` if it is the body of a scan."""
        ...


@dataclasses.dataclass(frozen=True)
class KeepAll:
    """Nothing is computed again: the fastest, and by far the most memory."""

    def wrap(self, layer: Function, scanned: bool) -> Function:
        return layer


@dataclasses.dataclass(frozen=True)
class KeepProducts:
    """Products with weights are kept; attention, norms and activations are computed again."""

    def wrap(self, layer: Function, scanned: bool) -> Function:
        policy = jax.checkpoint_policies.save_only_these_names(_PRODUCT)
        return jax.checkpoint(layer, prevent_cse=not scanned, policy=policy)


@dataclasses.dataclass(frozen=True)
class KeepInputs:
    """Only each layer's input is kept: the least memory, a third more arithmetic."""

    def wrap(self, layer: Function, scanned: bool) -> Function:
        return jax.checkpoint(layer, prevent_cse=not scanned)


def product(x: jax.Array) -> jax.Array:
    """Marks the result of a product with a weight, for `KeepProducts`."""
    return checkpoint_name(x, _PRODUCT)
