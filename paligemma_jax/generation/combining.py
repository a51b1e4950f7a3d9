"""Constraints that go together with others: a least length, and several at once.

Letters: B batch, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.constraint import Constraint


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinNewTokens:
    """EOS is not allowed before `count` other tokens; `min_new_tokens` makes it."""

    count: jax.Array  # i32[]
    eos_id: jax.Array  # i32[]

    @classmethod
    def of(cls, count: int, eos_id: int) -> "MinNewTokens":
        """From plain numbers; raises ConfigError for a negative count."""
        if count < 0:
            raise ConfigError(
                f"An answer cannot have {count} tokens. 0 or more fit. "
                "Call MinNewTokens.of(5, tokenizer.eos_id)"
            )
        return cls(jnp.asarray(count, jnp.int32), jnp.asarray(eos_id, jnp.int32))

    def check(self, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ConfigError if an answer may not have as many tokens as it must have."""
        if max_new_tokens < (count := int(self.count)):
            raise ConfigError(
                f"max_new_tokens is {max_new_tokens}, but answers must have {count} tokens. At "
                f"least {count} fits. Pass max_new_tokens={count}"
            )

    def start(self, batch: int, limit: Int[Array, ""]) -> Int[Array, " B"]:
        return jnp.zeros((batch,), jnp.int32)

    def allow(self, state: Int[Array, " B"], logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        early = state < self.count
        is_eos = jnp.arange(logits.shape[1]) == self.eos_id
        return jnp.where(early[:, None] & is_eos, -jnp.inf, logits)

    def advance(self, state: Int[Array, " B"], token: Int[Array, " B"]) -> Int[Array, " B"]:
        return state + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AllOf:
    """A token may come next if every one of several constraints allows it.

    They are asked in their order. One that would leave a row without any token is passed over at
    that step: answers keep the first constraint always, the next ones as far as they can. So with a
    grammar first and a least number of tokens second, an answer is well-formed, if shorter.
    """

    constraints: tuple[Constraint, ...]

    def check(self, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ConfigError for no constraints, and as each of them does."""
        if not self.constraints:
            raise ConfigError(
                "All of no constraints is no constraint. At least one fits. "
                "Leave it out, or call AllOf((constraint, other))"
            )
        for constraint in self.constraints:
            constraint.check(vocab_size, max_new_tokens)

    def start(self, batch: int, limit: Int[Array, ""]) -> tuple[Any, ...]:
        return tuple(constraint.start(batch, limit) for constraint in self.constraints)

    def allow(self, state: tuple[Any, ...], logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        first, *others = zip(self.constraints, state, strict=True)
        allowed = first[0].allow(first[1], logits)
        for constraint, own in others:
            fewer = constraint.allow(own, allowed)
            some = jnp.any(fewer > -jnp.inf, axis=1, keepdims=True)
            allowed = jnp.where(some, fewer, allowed)
        return allowed

    def advance(self, state: tuple[Any, ...], token: Int[Array, " B"]) -> tuple[Any, ...]:
        together = zip(self.constraints, state, strict=True)
        return tuple(constraint.advance(own, token) for constraint, own in together)


def at_least(
    count: int, eos_id: int, constraint: Constraint | Sequence[Constraint] | None
) -> Constraint | list[Constraint]:
    """`constraint`, one for all rows or one a row, and `count` tokens as far as it allows."""
    least = MinNewTokens.of(count, eos_id)
    if constraint is None:
        return least
    if isinstance(constraint, Constraint):
        return AllOf((constraint, least))
    return [AllOf((one, least)) for one in constraint]
