"""Sets of token sequences as a tree: on the host to build, on the device to walk.

Letters: B batch, V vocabulary, S nodes, C children a node.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.errors import ConfigError
from paligemma_jax.processing.buckets import bucket

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
                f"The constraint is made of the {self.vocab_size:,} pieces of its tokenizer, but "
                f"the model has {vocab_size:,}. The model's own tokenizer fits. "
                "Make it with: pali.processor.tokenizer"
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
