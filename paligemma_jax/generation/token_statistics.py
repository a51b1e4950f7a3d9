"""Numbers to measure at every decoding step, besides the token's log-probability.

Letters: B batch, V vocabulary, K numbers measured.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.box_scores import NEAR_RADII
from paligemma_jax.processing.tokenizer import LOC_PIECES


@runtime_checkable
class TokenStatistics(Protocol):
    """A pytree that measures K numbers at each step; they become `Generation.extras`."""

    def measure(self, logits: Float[Array, "B V"], token: Int[Array, " B"]) -> Float[Array, "B K"]:
        """Numbers about the step that chose `token`; `logits` are the model's, unmasked."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocationStatistics:
    """Probability mass on location tokens, and on those near the chosen one; scores of boxes.

    Log-probabilities (nats): of all `<loc>` tokens together, whatever was chosen; and of those at
    most so many bins from the chosen one, for each of `radii`, 0 where the chosen token is no
    `<loc>`. A coordinate some bins off may be as good a box, so these say more than the chosen
    token's own probability.
    """

    loc_start: int = dataclasses.field(metadata={"static": True})
    radii: tuple[int, ...] = dataclasses.field(default=NEAR_RADII, metadata={"static": True})

    def __post_init__(self) -> None:
        if min(self.radii, default=0) < 0:
            raise ConfigError(f"radii: expected numbers of bins, 0 or more, got {self.radii}.")

    def measure(self, logits: Float[Array, "B V"], token: Int[Array, " B"]) -> Float[Array, "B K"]:
        end = self.loc_start + len(LOC_PIECES)
        if not 0 <= self.loc_start <= end <= logits.shape[1]:
            raise ConfigError(
                f"expected location tokens within a vocabulary of {logits.shape[1]}, got them from "
                f"{self.loc_start} on. Call LocationStatistics(pali.processor.tokenizer.loc_start)"
            )
        total = jax.nn.logsumexp(logits, axis=1)
        locations = logits[:, self.loc_start : end]
        chosen = (token - self.loc_start)[:, None]
        distance = jnp.abs(jnp.arange(len(LOC_PIECES)) - chosen)
        is_location = (chosen[:, 0] >= 0) & (chosen[:, 0] < len(LOC_PIECES))
        columns = [jax.nn.logsumexp(locations, axis=1) - total]
        for radius in self.radii:
            near = jax.nn.logsumexp(locations, axis=1, where=distance <= radius) - total
            columns.append(jnp.where(is_location, near, 0.0))
        return jnp.stack(columns, axis=1)
