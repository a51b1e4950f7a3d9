"""Which keys a query attends to: prefix-LM blocks, padding and sliding windows.

Letters: B batch, T query tokens, S key slots.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

_STATIC: dict[str, Any] = {"static": True}
Layer = int | jax.Array  # number of a layer, known or not while a program is made


def prefix_lm_mask(
    mask_ar: Int[Array, "B T"], input_mask: Bool[Array, "B T"]
) -> Bool[Array, "B T T"]:
    """Which token (row) attends to which (column): big_vision's `mask_ar` rule.

    `mask_ar[i] == 1` says that tokens before i must not attend to i; runs of 0 form one block that
    attends to itself fully. With three prefix tokens and two of an answer, mask_ar = 0 0 0 1 1:

        # # # . .
        # # # . .
        # # # . .
        # # # # .
        # # # # #
    """
    return PrefixMask.of(mask_ar, input_mask).visible(0)


def sliding_window_mask(
    mask: Bool[Array, "B T S"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    same_block: Bool[Array, "B T S"],
    window: int,
) -> Bool[Array, "B T S"]:
    """Narrows `mask` to the last `window` positions, except inside one bidirectional block.

    Hugging Face's rule for the even layers of Gemma 2: image and prompt attend to each
    other fully, answer tokens to the last `window` positions, themselves included.
    """
    near = query_positions[:, :, None] - key_positions[:, None, :] < window
    return mask & (near | same_block)


@runtime_checkable
class Mask(Protocol):
    """A pytree that says which keys every query of every layer attends to.

    It is asked layer by layer and can be asked for some queries only, so that no T x S matrix need
    ever be held for a long sequence.
    """

    def visible(self, layer: Layer) -> Bool[Array, "B T S"]:
        """True where the query (row) attends to the key (column)."""
        ...

    def rows(self, start: Int[Array, ""], count: int) -> "Mask":
        """The same for `count` queries from `start` on."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixMask:
    """The mask of a whole sequence, from O(T) numbers; made by `of`.

    `block` numbers the blocks of `mask_ar`: a token attends to its own block and those before it.
    """

    query_block: jax.Array  # i32[B, T]
    query_valid: jax.Array  # bool[B, T]
    query_positions: jax.Array  # i32[B, T]
    key_block: jax.Array  # i32[B, S]
    key_valid: jax.Array  # bool[B, S]
    key_positions: jax.Array  # i32[B, S]
    window: int | None = dataclasses.field(default=None, metadata=_STATIC)

    @classmethod
    def of(
        cls,
        mask_ar: Int[Array, "B T"],
        input_mask: Bool[Array, "B T"],
        window: int | None = None,
    ) -> "PrefixMask":
        """Of a sequence that attends to itself; `window` narrows the even layers."""
        block, positions = jnp.cumsum(mask_ar, axis=1), token_positions(input_mask)
        own = (block, input_mask, positions)
        return cls(*own, *own, window=window)

    def visible(self, layer: Layer) -> Bool[Array, "B T S"]:
        query, key = self.query_block[:, :, None], self.key_block[:, None, :]
        allowed = (key <= query) & self.query_valid[:, :, None] & self.key_valid[:, None, :]
        positions = (self.query_positions, self.key_positions)
        return _windowed(allowed, *positions, key == query, self.window, layer)

    def rows(self, start: Int[Array, ""], count: int) -> "PrefixMask":
        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)

        return dataclasses.replace(
            self,
            query_block=cut(self.query_block),
            query_valid=cut(self.query_valid),
            query_positions=cut(self.query_positions),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotMask:
    """A mask that is known pair by pair: of a few tokens that attend to a cache."""

    allowed: jax.Array  # bool[B, T, S]
    query_positions: jax.Array  # i32[B, T]
    key_positions: jax.Array  # i32[B, S]
    window: int | None = dataclasses.field(default=None, metadata=_STATIC)

    def visible(self, layer: Layer) -> Bool[Array, "B T S"]:
        positions = (self.query_positions, self.key_positions)
        return _windowed(self.allowed, *positions, jnp.zeros_like(self.allowed), self.window, layer)

    def rows(self, start: Int[Array, ""], count: int) -> "SlotMask":
        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)

        return dataclasses.replace(
            self, allowed=cut(self.allowed), query_positions=cut(self.query_positions)
        )


def token_positions(valid: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Place of each token in its row's sequence, padding not counted."""
    return jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)


def _windowed(
    allowed: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    same_block: jax.Array,
    window: int | None,
    layer: Layer,
) -> jax.Array:
    """`allowed`, narrowed by the window in even layers."""
    if window is None or (isinstance(layer, int) and layer % 2):
        return allowed
    near = sliding_window_mask(allowed, query_positions, key_positions, same_block, window)
    return near if isinstance(layer, int) else jnp.where(layer % 2 == 0, near, allowed)
