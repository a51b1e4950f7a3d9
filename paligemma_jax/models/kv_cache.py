"""The key-value cache: what every layer remembers of the tokens so far.

Letters: B batch, T tokens, S slots (the cache's length), K key-value heads, H head width, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from paligemma_jax.models.layers import DType
from paligemma_jax.models.masks import Layer

LayerArrays = jax.Array | tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rotated keys and values of every layer, slot by slot.

    They are stored as the layers themselves are: stacked where a scan runs over them, in a tuple
    where layers stand by themselves. A prompt fills slots 0..T-1 (a shorter sequence leaves its
    padding slots invalid), each generated token the next slot, the same one for every sequence;
    `valid` and `positions` say what a slot holds. Sequences that go on at different paces have a
    `length` each.
    """

    k: LayerArrays  # [L, B, K, S, H], or L of [B, K, S, H]
    v: LayerArrays
    valid: jax.Array  # bool[B, S]
    positions: jax.Array  # i32[B, S], place in the sequence
    length: jax.Array  # i32[], slots in use; or i32[B], of each sequence

    @classmethod
    def empty(
        cls,
        depth: int,
        batch: int,
        kv_heads: int,
        slots: int,
        head_dim: int,
        dtype: DType,
        *,
        stacked: bool,
    ) -> "KVCache":
        """A cache with nothing in it."""
        shape = (batch, kv_heads, slots, head_dim)

        def zeros() -> LayerArrays:
            if stacked:
                return jnp.zeros((depth, *shape), dtype)
            return tuple(jnp.zeros(shape, dtype) for _ in range(depth))

        return cls(
            zeros(),
            zeros(),
            valid=jnp.zeros((batch, slots), bool),
            positions=jnp.zeros((batch, slots), jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )

    @property
    def nbytes(self) -> int:
        """Size of the keys and values."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.k, self.v)))

    def write(self, layer: Layer, k: jax.Array, v: jax.Array) -> "KVCache":
        """Stores k, v [B, K, T, H] of one layer at slots length..length+T-1."""
        return dataclasses.replace(
            self, k=self._store(self.k, layer, k), v=self._store(self.v, layer, v)
        )

    def read(self, layer: Layer) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, K, S, H] of one layer."""
        return _layer(self.k, layer), _layer(self.v, layer)

    def reserve(self, valid: jax.Array, positions: jax.Array) -> "KVCache":
        """Marks the next T slots with valid bool[B, T], positions i32[B, T]; length unchanged."""

        def store(old: jax.Array, new: jax.Array) -> jax.Array:
            if self.length.ndim:
                return old.at[self._next_slots(new.shape[1])].set(new)
            return jax.lax.dynamic_update_slice(old, new, (0, self.length))

        return dataclasses.replace(
            self, valid=store(self.valid, valid), positions=store(self.positions, positions)
        )

    def advance(self, tokens: int) -> "KVCache":
        """Counts `tokens` more slots as used."""
        return dataclasses.replace(self, length=self.length + tokens)

    def repeat(self, times: int) -> "KVCache":
        """Each sequence `times` times, side by side; for one length of all."""

        def each(arrays: LayerArrays) -> LayerArrays:
            if isinstance(arrays, tuple):
                return tuple(jnp.repeat(array, times, axis=0) for array in arrays)
            return jnp.repeat(arrays, times, axis=1)

        return dataclasses.replace(
            self,
            k=each(self.k),
            v=each(self.v),
            valid=jnp.repeat(self.valid, times, axis=0),
            positions=jnp.repeat(self.positions, times, axis=0),
        )

    def _store(self, old: LayerArrays, layer: Layer, new: jax.Array) -> LayerArrays:
        if isinstance(old, tuple):
            assert isinstance(layer, int), "layers that stand by themselves are not scanned over"
            return (*old[:layer], self._store_layer(old[layer], new), *old[layer + 1 :])
        new = new.astype(old.dtype)
        if self.length.ndim:
            sequences, slots = self._next_slots(new.shape[2])
            return old.at[layer, sequences, :, slots].set(new.swapaxes(1, 2))
        return jax.lax.dynamic_update_slice(old, new[None], (layer, 0, 0, self.length, 0))

    def _store_layer(self, old: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(old.dtype)
        if self.length.ndim:
            sequences, slots = self._next_slots(new.shape[2])
            return old.at[sequences, :, slots].set(new.swapaxes(1, 2))
        return jax.lax.dynamic_update_slice(old, new, (0, 0, self.length, 0))

    def _next_slots(self, tokens: int) -> tuple[jax.Array, jax.Array]:
        """Sequences [B, 1] and their next slots [B, T], where each has its own length."""
        slots = self.length[:, None] + jnp.arange(tokens)
        return jnp.arange(slots.shape[0])[:, None], slots


def _layer(arrays: LayerArrays, layer: Layer) -> jax.Array:
    if isinstance(arrays, tuple):
        assert isinstance(layer, int), "layers that stand by themselves are not scanned over"
        return arrays[layer]
    return jax.lax.dynamic_index_in_dim(arrays, layer, keepdims=False)
