"""How the next token is chosen: small frozen dataclasses, one rule each.

Letters: B batch, V vocabulary.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from paligemma_jax.errors import ConfigError


@runtime_checkable
class Sampler(Protocol):
    """Chooses one token a row; `keys` are random keys, one a row, fresh at every step."""

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """The likeliest token."""

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temperature:
    """A draw from softmax(logits / temperature)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"A temperature of {self.temperature} cannot be sampled from; it must be positive. "
                "For the likeliest token use Greedy()."
            )

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        draw = jax.vmap(jax.random.categorical)(keys, logits / self.temperature)
        return draw.astype(jnp.int32)
