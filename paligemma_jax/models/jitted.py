"""`jax.jit` for programs that multiply by a model's weights, which may be of few bits."""

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import jax
from jax.core import Tracer

from paligemma_jax.models.backend import on_cpu

P = ParamSpec("P")
R = TypeVar("R")

# Scales of groups of 4-bit weights are applied inside of a product; without it XLA for GPUs writes
# the whole matrix in 16 bits and reads it again. It changes no other product.
_OPTIONS = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}


class Jitted(Generic[P, R]):
    """A function as `jax.jit` compiles it, on accelerators with options for products.

    Takes what `jax.jit` takes, and has the attributes of what that returns. Inside of another
    jitted function the options are up to that one.
    """

    def __init__(self, function: Callable[P, R], **how: Any):
        functools.update_wrapper(self, function)
        self._plain = jax.jit(function, **how)
        self._with_options = jax.jit(function, compiler_options=_OPTIONS, **how)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        jitted = self._jitted()
        if jitted is not self._plain:
            leaves = jax.tree.leaves((args, kwargs))
            jitted = self._plain if any(isinstance(x, Tracer) for x in leaves) else jitted
        return jitted(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._jitted(), name)

    def _jitted(self) -> Any:
        return self._plain if on_cpu() or not _known() else self._with_options


@functools.cache
def _known() -> bool:
    """Whether this version of XLA has the options; they are experimental."""
    try:
        jax.jit(lambda: 0, compiler_options=_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
