"""The logit from which on the likeliest tokens have a given share of the probability, unsorted.

Sorting 257,152 logits takes 55 ms on a processor core where this takes 3.5; both find one token.

Letters: B batch, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

_SIGN = np.uint32(0x80000000)
_REST = np.uint32(0x7FFFFFFF)


def mass_threshold(logits: Float[Array, "B V"], p: float) -> Float[Array, " B"]:
    """The largest logit such that tokens with it or more have probability `p` or more together.

    The smallest logit of a row where rounding keeps the sum of all below `p`. It is found by
    halving the range of floats, of which there are 2^32: each of 32 steps sums the probabilities
    above the middle. The maximum for `p` 0.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    ranks = _rank(logits)
    low, high = jnp.min(ranks, axis=-1), jnp.max(ranks, axis=-1)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = high - (high - low) // 2  # above low, as long as they differ
        mass = jnp.sum(probabilities, axis=-1, where=ranks >= middle[:, None])
        enough = mass >= p
        below = jnp.maximum(middle - 1, low)
        return jnp.where(enough, middle, low), jnp.where(enough, high, below)

    low, high = jax.lax.fori_loop(0, 32, halve, (low, high))
    return _value(low)


def _rank(values: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Whole numbers in the order of float32 values: negative floats are ordered backwards."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)


def _value(ranks: UInt[Array, "..."]) -> Float[Array, "..."]:
    """Inverse of `_rank`."""
    bits = jnp.where(ranks >= _SIGN, ranks & _REST, ~ranks)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
