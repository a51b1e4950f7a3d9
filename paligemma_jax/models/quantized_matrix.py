"""Matrices of few bits that are multiplied as they are: nothing of their size is ever widened.

Letters: O output channels, I inputs (contracted), R rows, G groups of inputs with a scale each.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from paligemma_jax.models.backend import on_cpu
from paligemma_jax.models.contraction import contract
from paligemma_jax.models.integers import Layout, multiply_groups, round_rows
from paligemma_jax.models.row_blocks import in_row_blocks

# Rows up to which float32 products of a CPU are faster than those of bfloat16.
FEW_ROWS_ON_CPU = 16


@runtime_checkable
class Matrix(Protocol):
    """A matrix [O, I], however it is stored."""

    values: nnx.Param
    scale: nnx.Param

    def product(self, x: Float[Array, "R I"]) -> Float[Array, "R O"]:
        """`x` times the transposed matrix, float32."""
        ...

    def take(self, rows: Int[Array, "..."]) -> Float[Array, "... I"]:
        """Some of its rows, float32."""
        ...


class QuantizedMatrix(nnx.Module):
    """Integers with a scale for each row, or each group of inputs; only the weights are rounded.

    Floats of 8 bits may stand for the integers. With one scale a row, these are multiplied as they
    are, exactly in bfloat16 too, and the float32 sum is scaled. With groups they are scaled before
    the product, in the rows' dtype: on CPUs a block of rows at a time, elsewhere inside of the
    product (see `Jitted`).
    """

    def __init__(self, values: Num[Array, "O stored"], scale: Float[Array, "O G"], layout: Layout):
        self.layout = layout
        self.values = nnx.Param(values)
        self.scale = nnx.Param(scale)

    def product(self, x: Float[Array, "R I"]) -> Float[Array, "R O"]:
        """See `Matrix`."""
        values, scale = self.values[...], self.scale[...].astype(jnp.float32)
        grouped = scale.shape[1] > 1
        if on_cpu():
            y = self._product_on_cpu(values, scale, x)
        elif not grouped:
            y = contract(self.layout.read(values), x)
        else:
            y = contract(multiply_groups(self.layout.read(values).astype(x.dtype), scale), x)
        return y if grouped else y * scale[:, 0]

    def take(self, rows: Int[Array, "..."]) -> Float[Array, "... I"]:
        """See `Matrix`."""
        values = self.values[...][rows.reshape(-1)]
        scale = self.scale[...][rows.reshape(-1)].astype(jnp.float32)
        found = multiply_groups(self.layout.read(values).astype(jnp.float32), scale)
        return found.reshape(*rows.shape, -1)

    def _product_on_cpu(
        self, values: Num[Array, "O stored"], scale: Float[Array, "O G"], x: Float[Array, "R I"]
    ) -> Float[Array, "R O"]:
        rows, columns = x.shape
        dtype = jnp.float32 if rows <= FEW_ROWS_ON_CPU else x.dtype
        inputs = self.layout.parts_of_rows(x.astype(dtype))

        def block(values: jax.Array, scale: jax.Array) -> jax.Array:
            parts = [part.astype(dtype) for part in self.layout.parts(values)]
            if scale.shape[1] > 1:
                parts = [multiply_groups(part, scale) for part in parts]
            return sum(
                (
                    jnp.einsum("oi,ri->or", part, x, preferred_element_type=jnp.float32)
                    for part, x in zip(parts, inputs, strict=True)
                ),
                jnp.zeros((), jnp.float32),
            )

        return in_row_blocks(block, values, scale, columns=columns).T


class DynamicMatrix(nnx.Module):
    """8 bits with a scale for each row, multiplied by rows that are rounded to 8 bits themselves.

    Sums are exact integers, and rows are rounded anew each time by their largest number. CPUs
    multiply integers in two thirds of the time that `QuantizedMatrix` takes; answers differ more
    from those of the weights before rounding.
    """

    def __init__(self, values: Int[Array, "O I"], scale: Float[Array, "O G"]):
        self.values = nnx.Param(values)
        self.scale = nnx.Param(scale)

    def product(self, x: Float[Array, "R I"]) -> Float[Array, "R O"]:
        """See `Matrix`."""
        rows, steps = round_rows(x, 8)
        y = _integer_product(self.values[...], rows).astype(jnp.float32)
        return y * steps * self.scale[...][:, 0]

    def take(self, rows: Int[Array, "..."]) -> Float[Array, "... I"]:
        """See `Matrix`."""
        return self.values[...][rows].astype(jnp.float32) * self.scale[...][rows]


def _integer_product(w: Int[Array, "O I"], x: Int[Array, "R I"]) -> Int[Array, "R O"]:
    """In the order that is fast; see `contraction`."""
    count = x.shape[0]
    if not on_cpu():
        return jnp.einsum("oi,ri->ro", w, x, preferred_element_type=jnp.int32)
    if count == 1:  # XLA has a fast product of integers for two rows at least
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    y = jnp.einsum("oi,ri->or", w, x, preferred_element_type=jnp.int32)
    return jax.lax.optimization_barrier(y).T[:count]
