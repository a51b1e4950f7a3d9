"""Which tokens may come next, held on the device so that the decode loop never leaves it.

Letters: B batch, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from paligemma_jax.errors import ConfigError


@runtime_checkable
class Constraint(Protocol):
    """A pytree whose leaves are arrays, such as the tables of an automaton.

    Leaves are data, not programs: another constraint of the same class and shapes runs the same
    compiled loop, so tables are padded to few sizes. The state is a pytree too, one entry a row.
    """

    def check(self, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ConfigError, before anything runs, if no answer could be given."""
        ...

    def start(self, batch: int, limit: Int[Array, ""]) -> Any:
        """The state of `batch` rows before their first token; `limit` tokens are all there is."""
        ...

    def allow(self, state: Any, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits, -inf where a token may not come next."""
        ...

    def advance(self, state: Any, token: Int[Array, " B"]) -> Any:
        """The state after one more token a row; rows that have ended get 0 and do not matter."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerRow:
    """A constraint for every row: one of any class, its leaves with a leading axis of rows."""

    rows: Any

    @classmethod
    def of(cls, constraints: Sequence[Constraint], row_mask: np.ndarray) -> "PerRow":
        """One for each real row of a batch, in order; `row_mask` bool[B] says which are real.

        Tables of different size are padded behind, integers with -1 and booleans with False.
        Raises ConfigError unless there is one a row, and all are of one class.
        """
        real = np.flatnonzero(row_mask)
        if len(constraints) != real.size:
            raise ConfigError(
                f"{len(constraints)} constraints do not match {real.size} prompts. One constraint "
                "a prompt, or one for all, fits. Pass constraint=[...] with one entry a prompt."
            )
        first = jax.tree.structure(constraints[0])
        if any(jax.tree.structure(other) != first for other in constraints):
            kinds = ", ".join(sorted({type(c).__name__ for c in constraints}))
            raise ConfigError(
                f"The constraints of this batch ({kinds}) are not all of one class and one "
                "tokenizer. Constraints of one class fit. Call generate() once for each class."
            )
        of_row = np.zeros(row_mask.size, int)
        of_row[real] = np.arange(real.size)
        return cls(jax.tree.map(lambda *leaves: jnp.asarray(_stack(leaves)[of_row]), *constraints))

    def check(self, vocab_size: int, max_new_tokens: int) -> None:
        """Each was checked before it became one of many."""

    def start(self, batch: int, limit: Int[Array, ""]) -> Any:
        return jax.vmap(lambda constraint: constraint.start(1, limit))(self.rows)

    def allow(self, state: Any, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        def of_row(constraint: Constraint, state: Any, logits: jax.Array) -> jax.Array:
            return constraint.allow(state, logits[None])[0]

        return jax.vmap(of_row)(self.rows, state, logits)

    def advance(self, state: Any, token: Int[Array, " B"]) -> Any:
        def of_row(constraint: Constraint, state: Any, token: jax.Array) -> Any:
            return constraint.advance(state, token[None])

        return jax.vmap(of_row)(self.rows, state, token)


def for_batch(
    constraint: Constraint | Sequence[Constraint],
    row_mask: np.ndarray,
    vocab_size: int,
    max_new_tokens: int,
) -> Constraint:
    """The constraint of a whole batch, checked: the one given, or the given ones by row."""
    if isinstance(constraint, Constraint):
        constraint.check(vocab_size, max_new_tokens)
        return constraint
    for one in constraint:
        one.check(vocab_size, max_new_tokens)
    return PerRow.of(constraint, row_mask)


def _stack(leaves: Sequence[jax.Array]) -> np.ndarray:
    arrays = [np.asarray(leaf) for leaf in leaves]
    shape = [max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True)]
    fill = False if arrays[0].dtype == bool else -1
    stacked = np.full((len(arrays), *shape), fill, arrays[0].dtype)
    for row, array in enumerate(arrays):
        stacked[(row, *map(slice, array.shape))] = array
    return stacked
