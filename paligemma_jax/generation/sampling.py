"""How the next token is chosen: small frozen dataclasses, one rule each.

`Greedy` takes the likeliest token. All others reshape the distribution and draw from what comes
out; they are samplers on their own, and `Chain` applies several of them before one draw.

Letters: B batch, V vocabulary.

The logit from which on the likeliest tokens have a given share of the probability, unsorted.

Sorting 257,152 logits takes 55 ms on a processor core where this takes 3.5; both find one token.

Letters: B batch, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt

from paligemma_jax.errors import ConfigError

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


@runtime_checkable
class Sampler(Protocol):
    """Chooses one token a row; `keys` are random keys, one a row, fresh at every step."""

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]: ...


@runtime_checkable
class Reshaping(Protocol):
    """Changes a distribution, row by row."""

    def reshape(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Logits of the new distribution; -inf for a token that is ruled out."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """The likeliest token; the first of equals."""

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return likeliest(logits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temperature:
    """A draw from softmax(logits / temperature)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"A temperature of {self.temperature} cannot be sampled from; it must be positive. "
                "For the likeliest token use Greedy()."
            )

    def reshape(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        return logits / self.temperature

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return draw(self.reshape(logits), keys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """A draw from the `k` likeliest tokens, and all that are as likely as the last of them."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(
                f"The {self.k} likeliest tokens cannot be drawn from; k must be at least 1. "
                "Call for example TopK(k=40)"
            )

    def reshape(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        if self.k >= logits.shape[-1]:
            return logits
        # The minimum and not the last of them: XLA turns that into sorting everything on a CPU.
        least = jnp.min(jax.lax.top_k(logits, self.k)[0], axis=-1, keepdims=True)
        return jnp.where(logits >= least, logits, -jnp.inf)

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return draw(self.reshape(logits), keys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nucleus:
    """A draw from the likeliest tokens that together have probability `p` (top-p).

    big_vision's rule: from the likeliest on, tokens are taken until their sum reaches `p`. So the
    token that crosses `p` is one of them, and so is every other as likely as that; `p` 0 leaves the
    likeliest. Its nucleus(p, t) is Chain((Temperature(temperature=t), Nucleus(p=p))).
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ConfigError(
                f"A nucleus of probability {self.p} does not exist; p must be from 0 to 1. "
                "Call for example Nucleus(p=0.9)"
            )

    def reshape(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        return jnp.where(logits >= mass_threshold(logits, self.p)[:, None], logits, -jnp.inf)

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return draw(self.reshape(logits), keys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinP:
    """A draw from the tokens at least `p` times as likely as the likeliest (arXiv 2407.01082).

    `p` 0 rules out nothing, `p` 1 leaves the likeliest and its equals.
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ConfigError(
                f"{self.p} of the likeliest token's probability is no bound for the others; p must "
                "be from 0 to 1. Call for example MinP(p=0.05)"
            )

    def reshape(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        if self.p == 0:
            return logits
        least = jnp.max(logits, axis=-1, keepdims=True) + math.log(self.p)
        return jnp.where(logits >= least, logits, -jnp.inf)

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return draw(self.reshape(logits), keys)


@dataclasses.dataclass(frozen=True)
class Chain:
    """A draw after several changes of the distribution, in the order given.

    Each step sees what the ones before it left, with probabilities that add up to 1 again. So the
    order matters: Chain((Temperature(temperature=0.7), TopK(k=40), Nucleus(p=0.9))), the order of
    Hugging Face and big_vision, takes the nucleus of the 40 likeliest at that temperature; a
    temperature at the end changes how the kept tokens are drawn, not which are kept.
    """

    steps: Sequence[Reshaping]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))  # hashable: part of the program
        wrong = [type(step).__name__ for step in self.steps if not isinstance(step, Reshaping)]
        if wrong or not self.steps:
            found = " and ".join(wrong) or "nothing"
            raise ConfigError(
                f"A chain of {found} changes no distribution. Temperature, TopK, Nucleus and MinP "
                "fit. Call for example Chain((Temperature(temperature=0.7), Nucleus(p=0.9)))"
            )

    def reshape(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        for step in self.steps:
            logits = step.reshape(logits)
        return logits

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return draw(self.reshape(logits), keys)


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The first of the largest logits; `argmax` takes XLA on CPUs five times as long."""
    place = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, place, logits.shape[-1] - 1), axis=-1)


def log_probability(logits: Float[Array, "B V"], token: Int[Array, " B"]) -> Float[Array, " B"]:
    """Of one token a row, in nats; without making those of all others."""
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)


def draw(logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
    """One token a row from softmax(logits), with the row's own key."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
