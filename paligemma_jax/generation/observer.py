"""What the decode loop notes down about every step besides the token.

Letters: B batch, V vocabulary, K numbers noted.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.tokenizer import LOC_PIECES


@runtime_checkable
class Observer(Protocol):
    """A pytree that reads K numbers off each step."""

    def observe(self, logits: Float[Array, "B V"], token: Int[Array, " B"]) -> Float[Array, "B K"]:
        """Numbers about the step that chose `token`; `logits` are the model's, unmasked."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoxEvidence:
    """How sure the model was of a location, and of its neighbourhood.

    Two log-probabilities (nats): of all `<loc>` tokens together, whatever was chosen; and of those
    at most `radius` bins from the chosen one, 0 where the chosen token is no `<loc>`. A coordinate
    one bin off is as good a box, so the second says more than the chosen token's own probability.
    """

    loc_start: int = dataclasses.field(metadata={"static": True})
    radius: int = dataclasses.field(default=8, metadata={"static": True})

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ConfigError(
                f"A radius of {self.radius} bins is no neighbourhood. 0 or more fits. "
                "Call BoxEvidence(tokenizer.loc_start, radius=8)"
            )

    def observe(self, logits: Float[Array, "B V"], token: Int[Array, " B"]) -> Float[Array, "B 2"]:
        end = self.loc_start + len(LOC_PIECES)
        if not 0 <= self.loc_start <= end <= logits.shape[1]:
            raise ConfigError(
                f"Location tokens from {self.loc_start} on do not fit a vocabulary of "
                f"{logits.shape[1]}. Those of the model's own tokenizer fit. "
                "Call BoxEvidence(tokenizer.loc_start)"
            )
        everything = jax.nn.logsumexp(logits, axis=1)
        locations = logits[:, self.loc_start : end]
        chosen = (token - self.loc_start)[:, None]
        near = jnp.abs(jnp.arange(len(LOC_PIECES)) - chosen) <= self.radius
        is_location = (chosen >= 0) & (chosen < len(LOC_PIECES))
        mass = jax.nn.logsumexp(locations, axis=1) - everything
        near_mass = jax.nn.logsumexp(locations, axis=1, where=near) - everything
        return jnp.stack([mass, jnp.where(is_location[:, 0], near_mass, 0.0)], axis=1)
