"""The key-value cache: what every layer remembers of the tokens so far.

Letters: B batch, T tokens, S slots, K key-value heads, H head width, L layers.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from paligemma_jax.models.layers import DType
from paligemma_jax.models.masks import Layer


@runtime_checkable
class KeyValues(Protocol):
    """Keys and values of all layers: a pytree, stored as the layers themselves are."""

    def write(self, layer: Layer, k: jax.Array, v: jax.Array, length: jax.Array) -> "KeyValues":
        """With k, v [B, K, T, H] of one layer at the slots that follow `length` (i32[] or [B])."""
        ...

    def read(self, layer: Layer) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, K, S, H] of one layer."""
        ...

    def repeat(self, times: int) -> "KeyValues":
        """Each row `times` times, side by side."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedKeyValues:
    """Of layers that a scan runs over: [L, B, K, S, H] each."""

    k: jax.Array
    v: jax.Array

    def write(self, layer: Layer, k: jax.Array, v: jax.Array, length: jax.Array) -> KeyValues:
        def store(old: jax.Array, new: jax.Array) -> jax.Array:
            new = new.astype(old.dtype)
            if length.ndim:
                rows, slots = _own_slots(length, new.shape[2])
                return old.at[layer, rows, :, slots].set(new.swapaxes(1, 2))
            return jax.lax.dynamic_update_slice(old, new[None], (layer, 0, 0, length, 0))

        return StackedKeyValues(store(self.k, k), store(self.v, v))

    def read(self, layer: Layer) -> tuple[jax.Array, jax.Array]:
        return (
            jax.lax.dynamic_index_in_dim(self.k, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.v, layer, keepdims=False),
        )

    def repeat(self, times: int) -> KeyValues:
        return StackedKeyValues(
            jnp.repeat(self.k, times, axis=1), jnp.repeat(self.v, times, axis=1)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKeyValues:
    """Of layers that stand by themselves: for each [B, K, S, H]."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    def write(self, layer: Layer, k: jax.Array, v: jax.Array, length: jax.Array) -> KeyValues:
        def store(old: jax.Array, new: jax.Array) -> jax.Array:
            new = new.astype(old.dtype)
            if length.ndim:
                rows, slots = _own_slots(length, new.shape[2])
                return old.at[rows, :, slots].set(new.swapaxes(1, 2))
            return jax.lax.dynamic_update_slice(old, new, (0, 0, length, 0))

        def replaced(every: tuple[jax.Array, ...], new: jax.Array) -> tuple[jax.Array, ...]:
            return (*every[:layer], store(every[layer], new), *every[layer + 1 :])

        assert isinstance(layer, int), "layers that stand by themselves are not scanned over"
        return LayerKeyValues(replaced(self.k, k), replaced(self.v, v))

    def read(self, layer: Layer) -> tuple[jax.Array, jax.Array]:
        assert isinstance(layer, int), "layers that stand by themselves are not scanned over"
        return self.k[layer], self.v[layer]

    def repeat(self, times: int) -> KeyValues:
        k, v = ((jnp.repeat(x, times, axis=0) for x in every) for every in (self.k, self.v))
        return LayerKeyValues(tuple(k), tuple(v))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rotated keys and values of every layer, slot by slot.

    A prompt fills slots 0..T-1 (a shorter row leaves its padding slots unused), each generated
    token the next slot, the same one for every row; `valid` and `positions` say what a slot holds.
    Rows that go on at different paces have a `length` each.
    """

    layers: KeyValues
    valid: jax.Array  # bool[B, S]
    positions: jax.Array  # i32[B, S], place in the row's own sequence
    length: jax.Array  # i32[], slots in use; or i32[B], of each row

    @property
    def nbytes(self) -> int:
        """Size of the keys and values."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.layers))

    def write(self, layer: Layer, k: jax.Array, v: jax.Array) -> "KVCache":
        """Stores k, v [B, K, T, H] of one layer at slots length..length+T-1."""
        return dataclasses.replace(self, layers=self.layers.write(layer, k, v, self.length))

    def read(self, layer: Layer) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, K, S, H] of one layer."""
        return self.layers.read(layer)

    def claim(self, valid: jax.Array, positions: jax.Array) -> "KVCache":
        """Marks the next T slots with valid bool[B, T], positions i32[B, T]; length unchanged."""

        def store(old: jax.Array, new: jax.Array) -> jax.Array:
            if self.length.ndim:
                rows, slots = _own_slots(self.length, new.shape[1])
                return old.at[rows, slots].set(new)
            return jax.lax.dynamic_update_slice(old, new, (0, self.length))

        return dataclasses.replace(
            self, valid=store(self.valid, valid), positions=store(self.positions, positions)
        )

    def advance(self, tokens: int) -> "KVCache":
        """Counts `tokens` more slots as used."""
        return dataclasses.replace(self, length=self.length + tokens)

    def repeat(self, times: int) -> "KVCache":
        """Each row `times` times, side by side; for one length of all rows."""
        return dataclasses.replace(
            self,
            layers=self.layers.repeat(times),
            valid=jnp.repeat(self.valid, times, axis=0),
            positions=jnp.repeat(self.positions, times, axis=0),
        )


def empty_stacked(
    depth: int, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: DType
) -> StackedKeyValues:
    """Nothing, for layers that a scan runs over."""
    shape = (depth, batch, kv_heads, slots, head_dim)
    return StackedKeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def empty_layers(
    depth: int, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: DType
) -> LayerKeyValues:
    """Nothing, for layers that stand by themselves."""

    def zeros() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros((batch, kv_heads, slots, head_dim), dtype) for _ in range(depth))

    return LayerKeyValues(zeros(), zeros())


def empty_cache(layers: KeyValues, batch: int, slots: int) -> KVCache:
    """A cache with nothing in it."""
    return KVCache(
        layers,
        valid=jnp.zeros((batch, slots), bool),
        positions=jnp.zeros((batch, slots), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def _own_slots(length: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Rows [B, 1] and their next slots [B, T], where every row has its own length."""
    slots = length[:, None] + jnp.arange(tokens)
    return jnp.arange(slots.shape[0])[:, None], slots
