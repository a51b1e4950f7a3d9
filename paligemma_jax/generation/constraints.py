"""Which tokens may come next, held on the device so that the decode loop never leaves it.

Letters: B batch, V vocabulary, S nodes of a trie, C children of a node at most.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.processing.processor import bucket
from paligemma_jax.processing.tokenizer import Tokenizer


@runtime_checkable
class Constraint(Protocol):
    """A pytree whose leaves are arrays, such as the tables of an automaton.

    Leaves are data, not programs: another constraint of the same class and shapes runs the same
    compiled loop, so tables are padded to few sizes. The state is a pytree too, with an entry for
    each sequence.
    """

    def check(self, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ConfigError, before anything runs, if no sequence could satisfy it."""
        ...

    def start(self, batch: int, limit: Int[Array, " B"]) -> Any:
        """The state of `batch` sequences before their first token; `limit` tokens are all."""
        ...

    def allow(self, state: Any, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits, -inf where a token may not come next."""
        ...

    def advance(self, state: Any, token: Int[Array, " B"]) -> Any:
        """The state after one more token; sequences that have ended get 0 and do not matter."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerSequence:
    """A constraint for every sequence: one of any class, its leaves with a leading axis B."""

    constraints: Any

    @classmethod
    def of(cls, constraints: Sequence[Constraint], mask: np.ndarray) -> "PerSequence":
        """One for each real sequence of a batch, in order; bool[B] `mask` says which are real.

        Tables of different size are padded behind, integers with -1 and booleans with False.
        Raises ConfigError unless all are of one class.
        """
        first = jax.tree.structure(constraints[0])
        if any(jax.tree.structure(other) != first for other in constraints):
            kinds = ", ".join(sorted({type(c).__name__ for c in constraints}))
            raise ConfigError(
                f"constraint: expected constraints of one class and one tokenizer in a batch, got "
                f"{kinds}. Call generate() once for each class."
            )
        of_sequence = np.zeros(mask.size, int)
        of_sequence[mask] = np.arange(len(constraints))
        stacked = jax.tree.map(lambda *x: jnp.asarray(_stack(x)[of_sequence]), *constraints)
        return cls(stacked)

    def check(self, vocab_size: int, max_new_tokens: int) -> None:
        """Each was checked before it became one of many."""

    def start(self, batch: int, limit: Int[Array, " B"]) -> Any:
        def one(constraint: Constraint, limit: jax.Array) -> Any:
            return constraint.start(1, limit[None])

        return jax.vmap(one)(self.constraints, limit)

    def allow(self, state: Any, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        def one(constraint: Constraint, state: Any, logits: jax.Array) -> jax.Array:
            return constraint.allow(state, logits[None])[0]

        return jax.vmap(one)(self.constraints, state, logits)

    def advance(self, state: Any, token: Int[Array, " B"]) -> Any:
        def one(constraint: Constraint, state: Any, token: jax.Array) -> Any:
            return constraint.advance(state, token[None])

        return jax.vmap(one)(self.constraints, state, token)


def for_batch(
    constraint: Constraint | Sequence[Constraint] | None,
    mask: np.ndarray,
    vocab_size: int,
    limits: Sequence[int],
) -> Constraint | None:
    """The constraint of a whole batch, checked: the one given, or the given ones by sequence.

    `mask` bool[B] says which sequences are real; `limits` are their max_new_tokens.
    """
    if isinstance(constraint, list | tuple) and all(c is constraint[0] for c in constraint):
        constraint = constraint[0]  # costs less than one for each sequence
    if isinstance(constraint, Constraint):
        constraint.check(vocab_size, min(limits))
    if constraint is None or isinstance(constraint, Constraint):
        return constraint
    for one, limit in zip(constraint, limits, strict=True):
        one.check(vocab_size, limit)
    return PerSequence.of(constraint, mask)


def repeat_constraint(constraint: Constraint | None, times: int) -> Constraint | None:
    """The constraint of a batch in which each sequence comes `times` times, side by side."""
    if times == 1 or not isinstance(constraint, PerSequence):
        return constraint
    return PerSequence(jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), constraint.constraints))


def _stack(leaves: Sequence[jax.Array]) -> np.ndarray:
    arrays = [np.asarray(leaf) for leaf in leaves]
    shape = [max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True)]
    fill = False if arrays[0].dtype == bool else -1
    stacked = np.full((len(arrays), *shape), fill, arrays[0].dtype)
    for row, array in enumerate(arrays):
        stacked[(row, *map(slice, array.shape))] = array
    return stacked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AllOf:
    """A token may come next if every one of several constraints allows it.

    They are asked in their order. One that would leave a sequence without any token is passed over
    at that step: sequences keep the first constraint always, the next ones as far as they can.
    """

    constraints: tuple[Constraint, ...]

    def check(self, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ConfigError for no constraints, and as each of them does."""
        if not self.constraints:
            raise ConfigError("AllOf: expected at least one constraint. AllOf((first, second))")
        for constraint in self.constraints:
            constraint.check(vocab_size, max_new_tokens)

    def start(self, batch: int, limit: Int[Array, " B"]) -> tuple[Any, ...]:
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


ROOT = 0
MIN_NODES, MIN_CHILDREN = 32, 8  # tables are padded to a power of two of at least so many
_NONE = -1

Edges = list[dict[int, int]]  # of each node: token -> node


def grow(edges: Edges, node: int, path: Sequence[int]) -> None:
    """Adds `path` below `node`; its last token leads back to the root."""
    for token in path[:-1]:
        if token not in edges[node]:
            edges.append({})
            edges[node][token] = len(edges) - 1
        node = edges[node][token]
    edges[node][path[-1]] = ROOT


def walk(edges: Edges, node: int, path: Iterable[int]) -> list[tuple[int, int]]:
    """The edges of a path that was grown from `node`, each as (node, token)."""
    steps = []
    for token in path:
        steps.append((node, token))
        node = edges[node][token]
    return steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTrie:
    """Children of every node; places without a child hold -1."""

    tokens: jax.Array  # i32[S, C]
    nodes: jax.Array  # i32[S, C]
    vocab_size: int = dataclasses.field(metadata={"static": True})  # of the tokenizer

    @classmethod
    def pack(cls, edges: Edges, vocab_size: int) -> "TokenTrie":
        """Device tables, padded so that tries of about the same size share a program."""
        tokens, nodes = _table(edges), _table(edges)
        for node, children in enumerate(edges):
            tokens[node, : len(children)] = list(children)
            nodes[node, : len(children)] = list(children.values())
        return cls(jnp.asarray(tokens), jnp.asarray(nodes), vocab_size)

    def check(self, vocab_size: int) -> None:
        """Raises ConfigError unless the model has the tokenizer's vocabulary."""
        if vocab_size != self.vocab_size:
            raise ConfigError(
                f"constraint: expected one for the model's {vocab_size:,} tokens, got one for "
                f"{self.vocab_size:,}. Make it with pali.processor.tokenizer"
            )

    def next(self, node: Int[Array, " B"], token: Int[Array, " B"]) -> Int[Array, " B"]:
        """Where `token` leads; the root where it leads nowhere."""
        taken = self.tokens[node] == token[:, None]
        return jnp.sum(jnp.where(taken, self.nodes[node], ROOT), axis=1)

    def reveal(
        self,
        masked: Float[Array, "B V"],
        logits: Float[Array, "B V"],
        node: Int[Array, " B"],
        open_edges: Bool[Array, "B C"],
    ) -> Float[Array, "B V"]:
        """Puts the logits of a node's open children into `masked`.

        Writes a few numbers instead of reading a mask as wide as the vocabulary.
        """
        tokens = self.tokens[node]
        row = jnp.arange(tokens.shape[0])[:, None]
        values = jnp.take_along_axis(logits, jnp.maximum(tokens, 0), axis=1)
        out_of_range = masked.shape[1]
        place = jnp.where(open_edges & (tokens >= 0), tokens, out_of_range)
        return masked.at[row, place].set(values, mode="drop")


def edge_values(edges: Edges, values: dict[tuple[int, int], int]) -> Int[Array, "S C"]:
    """One number for each edge (node, token), 0 where none is given, beside the trie's tables."""
    table = _table(edges)
    for node, children in enumerate(edges):
        for place, token in enumerate(children):
            table[node, place] = values.get((node, token), 0)
    return jnp.asarray(table)


def _table(edges: Edges) -> np.ndarray:
    widest = max(map(len, edges))
    return np.full((bucket(len(edges), MIN_NODES), bucket(widest, MIN_CHILDREN)), _NONE, np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenMask:
    """The same tokens at every step: those where `allowed` is True.

    Without EOS among them every answer is cut at the largest number of tokens.
    """

    allowed: jax.Array | np.ndarray  # bool[V]

    def check(self, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ConfigError for a mask of another vocabulary, or one that allows nothing."""
        allowed = np.asarray(self.allowed)
        if allowed.shape != (vocab_size,):
            raise ConfigError(
                f"token mask: expected a boolean for each of {vocab_size:,} tokens, got shape "
                f"{allowed.shape}. Call allow_tokens(ids, pali.processor.tokenizer.vocab_size)"
            )
        if not allowed.any():
            raise ConfigError(
                "token mask: expected at least one allowed token, got none. Call "
                "allow_tokens([*ids, tokenizer.eos_id], tokenizer.vocab_size)"
            )

    def start(self, batch: int, limit: Int[Array, " B"]) -> None:
        return None

    def allow(self, state: None, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        return jnp.where(self.allowed, logits, -jnp.inf)

    def advance(self, state: None, token: Int[Array, " B"]) -> None:
        return None


def allow_tokens(ids: Iterable[int], vocab_size: int) -> TokenMask:
    """Only these tokens; raises ConfigError for ids outside the vocabulary."""
    return TokenMask(jnp.asarray(_mark(ids, vocab_size)))


def forbid_tokens(ids: Iterable[int], vocab_size: int) -> TokenMask:
    """Every token but these; raises ConfigError for ids outside the vocabulary."""
    return TokenMask(jnp.asarray(~_mark(ids, vocab_size)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AllowedAnswers:
    """One of a set of whole answers, made by `allowed_answers`.

    Tokens are chosen one by one, so greedy decoding takes the most probable beginning at each step,
    which need not lead to the most probable answer: scoring all of them finds that one.
    """

    trie: TokenTrie
    longest: jax.Array  # i32[], tokens, EOS included

    def check(self, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ConfigError for another vocabulary, or if the longest answer would be cut."""
        self.trie.check(vocab_size)
        if max_new_tokens < (longest := int(self.longest)):
            raise ConfigError(
                f"max_new_tokens: expected at least {longest}, the longest allowed answer with "
                f"EOS, got {max_new_tokens}."
            )

    def start(self, batch: int, limit: Int[Array, " B"]) -> Int[Array, " B"]:
        return jnp.full((batch,), ROOT, jnp.int32)

    def allow(self, state: Int[Array, " B"], logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        every_edge = jnp.ones((state.shape[0], self.trie.tokens.shape[-1]), bool)
        return self.trie.reveal(jnp.full_like(logits, -jnp.inf), logits, state, every_edge)

    def advance(self, state: Int[Array, " B"], token: Int[Array, " B"]) -> Int[Array, " B"]:
        return self.trie.next(state, token)


def allowed_answers(tokenizer: Tokenizer, answers: Sequence[str]) -> AllowedAnswers:
    """Exactly one of `answers`, such as "yes" and "no"; "" is the empty answer.

    Raises InvalidPromptError for no answers, and for text that the tokenizer cannot represent.
    """
    if isinstance(answers, str) or not answers:
        raise InvalidPromptError(
            f"answers: expected a list of at least one text, got {answers!r}. "
            "Call allowed_answers(tokenizer, ['yes', 'no'])"
        )
    edges = [{}]
    longest = 0
    for answer in answers:
        path = [*faithful_ids(tokenizer, answer, f"answer {answer!r}"), tokenizer.eos_id]
        grow(edges, ROOT, path)
        longest = max(longest, len(path))
    return AllowedAnswers(
        TokenTrie.pack(edges, tokenizer.vocab_size), jnp.asarray(longest, jnp.int32)
    )


def faithful_ids(tokenizer: Tokenizer, text: str, what: str) -> list[int]:
    """Ids of `text`; InvalidPromptError if they would not decode to it again."""
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:
        raise InvalidPromptError(
            f"{what}: expected characters that the tokenizer can represent; they are decoded as "
            f"{tokenizer.decode(ids)!r}."
        )
    return ids


def _mark(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """True at `ids`, bool[V]."""
    marked = np.zeros(vocab_size, bool)
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"token id: expected 0 to {vocab_size - 1}, got {token}. Find ids with "
                "tokenizer.encode(text)"
            )
        marked[token] = True
    return marked
