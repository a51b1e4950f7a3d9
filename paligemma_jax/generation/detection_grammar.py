"""The automaton of `detect` and `segment` answers, which makes every one of them parse.

    answer   = EOS | object { " ; " object } EOS
    object   = y1 x1 y2 x2 [ 16 codes ] " " label

with y1 < y2 and x1 < x2, no box twice, and one of the labels asked for. The automaton knows how
many tokens are left and starts no object that might not be finished.

Letters: B batch, V vocabulary, S nodes and C children of the labels' tree, N boxes at most, L bins.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.generation.constraints import (
    ROOT,
    Edges,
    TokenTrie,
    edge_values,
    faithful_ids,
    grow,
    walk,
)
from paligemma_jax.processing import prompts
from paligemma_jax.processing.processor import bucket
from paligemma_jax.processing.tokenizer import LOC_PIECES, SEG_PIECES, Tokenizer

CORNERS = 4
CODES = 16


@dataclasses.dataclass(frozen=True)
class LabelPaths:
    """One label: the tokens behind its box (and codes) at the answer's end, and before a box.

    The two are tokenized apart, since pieces may span the end of the label and the separator.
    """

    last: tuple[int, ...]  # " cat", EOS
    again: tuple[int, ...]  # " cat ; ", with the next `<loc>` to come


def label_paths(tokenizer: Tokenizer, labels: str | Sequence[str], masks: bool) -> list[LabelPaths]:
    """The paths of every label, in the form the prompts `detect` and `segment` give it.

    Raises InvalidPromptError for no labels, labels with a semicolon or a line break, with location
    or segmentation tokens, or with characters that the tokenizer cannot represent.
    """
    listed = prompts.detect(labels).removeprefix("detect ").split(" ; ")
    return [_paths(tokenizer, label, masks) for label in dict.fromkeys(listed)]


def label_edges(paths: Sequence[LabelPaths], next_object: int) -> tuple[Edges, dict]:
    """The tree of all labels, and for its edges that lead to another object alone what they cost.

    A cost is the number of tokens that must be left to take the edge, if the object that follows
    takes `next_object`; edges on the way to an end have none.
    """
    edges: Edges = [{}]
    for label in paths:
        grow(edges, ROOT, label.last)
        grow(edges, ROOT, label.again)
    costs: dict[tuple[int, int], int] = {}
    for label in paths:
        for done, edge in enumerate(walk(edges, ROOT, label.again)):
            cost = len(label.again) - done + next_object
            costs[edge] = max(cost, costs.get(edge, 0))
    for label in paths:
        for edge in walk(edges, ROOT, label.last):
            costs.pop(edge, None)
    return edges, costs


def _paths(tokenizer: Tokenizer, label: str, masks: bool) -> LabelPaths:
    body = LOC_PIECES[0] * CORNERS + SEG_PIECES[0] * CODES * masks
    what = f"label {label!r}"
    last = faithful_ids(tokenizer, f"{body} {label}", what)
    again = faithful_ids(tokenizer, f"{body} {label} ; {LOC_PIECES[0]}", what)
    start = CORNERS + CODES * masks
    last, again = last[start:], again[start:-1]
    special = range(tokenizer.loc_start, tokenizer.loc_start + len(LOC_PIECES))
    codes = range(tokenizer.seg_start, tokenizer.seg_start + len(SEG_PIECES))
    if any(token in special or token in codes for token in last):
        raise InvalidPromptError(
            f"{what}: expected plain words, got a location or segmentation token, which would be "
            "read as a part of the box."
        )
    return LabelPaths((*last, tokenizer.eos_id), tuple(again))


MAX_OBJECTS = 100  # as many as COCO's evaluation looks at
MOST_OBJECTS = 1024  # that there may be room for
MIN_BOXES = 16  # room is made for a power of two of at least so many boxes
BINS = len(LOC_PIECES)
_DIGIT = 32  # bins are numbers of two such digits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ObjectState:
    """Where each sequence is in its answer."""

    place: jax.Array  # i32[B], tokens of the current object so far; stays at the label
    node: jax.Array  # i32[B], of the labels' tree
    corners: jax.Array  # i32[B, 4], bins of the current box, y1 x1 y2 x2
    boxes: jax.Array  # i32[B, N, 4], all finished boxes, -1 where there is none
    count: jax.Array  # i32[B], of finished boxes
    left: jax.Array  # i32[B], tokens that may still be written


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ObjectGrammar:
    """Well-formed answers about objects; made by `detection_grammar`, `segmentation_grammar`.

    Its tables are a few kilobytes: what may come next is a range of locations or codes, or the
    children of a node, so a step reads no mask as wide as the vocabulary.
    """

    trie: TokenTrie
    costs: jax.Array  # i32[S, C], tokens an edge needs if it leads to another object, or 0
    label_place: jax.Array  # i32[], tokens before an object's label: 4, or 20 with codes
    longest: jax.Array  # i32[], tokens of an object with the longest label, and EOS
    max_objects: jax.Array  # i32[]
    no_boxes: jax.Array  # i32[N, 4], -1: how many boxes there is room for
    loc_start: int = dataclasses.field(metadata={"static": True})
    seg_start: int = dataclasses.field(metadata={"static": True})

    def check(self, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ConfigError for another vocabulary, or if not even one object could be told."""
        self.trie.check(vocab_size)
        if max_new_tokens < (longest := int(self.longest)):
            raise ConfigError(
                f"max_new_tokens: expected at least {longest}, one object with the longest label "
                f"and EOS, got {max_new_tokens}."
            )

    def start(self, batch: int, limit: Int[Array, " B"]) -> ObjectState:
        zeros = jnp.zeros((batch,), jnp.int32)
        return ObjectState(
            place=zeros,
            node=zeros,
            corners=jnp.zeros((batch, CORNERS), jnp.int32),
            boxes=jnp.broadcast_to(self.no_boxes, (batch, *self.no_boxes.shape)),
            count=zeros,
            left=limit,
        )

    def allow(self, state: ObjectState, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        masked = jnp.full_like(logits, -jnp.inf)
        masked = _reveal_block(masked, logits, self.loc_start, self._open_bins(state))
        codes = (state.place >= CORNERS) & (state.place < self.label_place)
        every_code = jnp.broadcast_to(codes[:, None], (codes.shape[0], len(SEG_PIECES)))
        masked = _reveal_block(masked, logits, self.seg_start, every_code)
        empty = (state.place == 0) & (state.count == 0)
        masked = _reveal_block(masked, logits, Tokenizer.eos_id, empty[:, None])
        return self.trie.reveal(masked, logits, state.node, self._open_edges(state))

    def advance(self, state: ObjectState, token: Int[Array, " B"]) -> ObjectState:
        bins = (token - self.loc_start)[:, None]
        corners = jnp.where(jnp.arange(CORNERS) == state.place[:, None], bins, state.corners)
        closes = state.place == CORNERS - 1
        room = jnp.arange(state.boxes.shape[1])
        here = closes[:, None] & (room == state.count[:, None])
        in_label = state.place == self.label_place
        node = jnp.where(in_label, self.trie.next(state.node, token), ROOT)
        after_label = jnp.where(node == ROOT, 0, state.place)
        return ObjectState(
            place=jnp.where(in_label, after_label, state.place + 1),
            node=node,
            corners=corners,
            boxes=jnp.where(here[:, :, None], corners[:, None], state.boxes),
            count=state.count + closes,
            left=state.left - 1,
        )

    def _open_bins(self, state: ObjectState) -> Bool[Array, "B L"]:
        """Locations that may come next: positive area, enough tokens left, and a new box."""
        place = state.place[:, None]
        first = jnp.take_along_axis(state.corners, jnp.clip(place - 2, 0, 1), axis=1)
        lowest = jnp.where(place >= 2, first + 1, 0)
        highest = jnp.where(place >= 2, BINS - 1, BINS - 2)
        bins = jnp.arange(BINS)
        affordable = (place > 0) | (state.left[:, None] >= self.longest)
        inside = (bins >= lowest) & (bins <= highest) & (place < CORNERS) & affordable
        return inside & ~_used_up(state)

    def _open_edges(self, state: ObjectState) -> Bool[Array, "B C"]:
        """Pieces of labels and separators that may come next."""
        costs = self.costs[state.node]
        another = (state.count[:, None] < self.max_objects) & (state.left[:, None] >= costs)
        return (state.place == self.label_place)[:, None] & ((costs == 0) | another)


def detection_grammar(
    tokenizer: Tokenizer, labels: str | Sequence[str], *, max_objects: int = MAX_OBJECTS
) -> ObjectGrammar:
    """Answers to `detect`: boxes of the given labels (a list, or "cat ; dog").

    Raises InvalidPromptError for labels that cannot be answered with (see `label_paths`), and
    ConfigError for less than one object, or more than 1,024.
    """
    return _grammar(tokenizer, labels, max_objects, masks=False)


def segmentation_grammar(
    tokenizer: Tokenizer, labels: str | Sequence[str], *, max_objects: int = MAX_OBJECTS
) -> ObjectGrammar:
    """Answers to `segment`: boxes with sixteen codes; arguments as for `detection_grammar`."""
    return _grammar(tokenizer, labels, max_objects, masks=True)


def _grammar(
    tokenizer: Tokenizer, labels: str | Sequence[str], max_objects: int, masks: bool
) -> ObjectGrammar:
    is_whole = isinstance(max_objects, int) and not isinstance(max_objects, bool)
    if not is_whole or not 1 <= max_objects <= MOST_OBJECTS:
        raise ConfigError(
            f"max_objects: expected a whole number from 1 to {MOST_OBJECTS:,}, got "
            f"{max_objects!r:.200}. Leave it out for {MAX_OBJECTS}."
        )
    labels = prompts.split_labels(labels)
    structure, tables = _tables(tokenizer, labels, max_objects, masks)
    return jax.tree.unflatten(structure, map(jnp.asarray, tables))


@functools.lru_cache(maxsize=64)
def _tables(
    tokenizer: Tokenizer, labels: tuple[str, ...], max_objects: int, masks: bool
) -> tuple[Any, list[np.ndarray]]:
    """Structure and leaves of a grammar, on the host: made once for the same labels."""
    paths = label_paths(tokenizer, labels, masks)
    label_place = CORNERS + CODES * masks
    longest = label_place + max(len(label.last) for label in paths)
    edges, costs = label_edges(paths, longest)
    grammar = ObjectGrammar(
        trie=TokenTrie.pack(edges, tokenizer.vocab_size),
        costs=edge_values(edges, costs),
        label_place=jnp.asarray(label_place, jnp.int32),
        longest=jnp.asarray(longest, jnp.int32),
        max_objects=jnp.asarray(max_objects, jnp.int32),
        no_boxes=jnp.asarray(np.full((bucket(max_objects, MIN_BOXES), CORNERS), -1, np.int32)),
        loc_start=tokenizer.loc_start,
        seg_start=tokenizer.seg_start,
    )
    leaves, structure = jax.tree.flatten(grammar)
    return structure, [np.asarray(leaf) for leaf in leaves]


def _used_up(state: ObjectState) -> Bool[Array, "B L"]:
    """Locations with which every box would be one there is already."""
    place = jnp.minimum(state.place, CORNERS - 1)[:, None]
    behind = jnp.arange(CORNERS) >= place
    same = jnp.all((state.boxes == state.corners[:, None]) | behind[:, None], axis=2)
    values = jnp.take_along_axis(state.boxes, place[:, :, None], axis=2)[:, :, 0]
    # A histogram of these values as a product of two small one-hot tables: far faster on CPUs
    # than comparing each with every bin.
    high = jax.nn.one_hot(values // _DIGIT, BINS // _DIGIT) * same[:, :, None]
    low = jax.nn.one_hot(values % _DIGIT, _DIGIT)
    times = jnp.einsum("BNI,BNJ->BIJ", high, low).reshape(-1, BINS).astype(jnp.int32)
    # So many boxes begin with the corners so far and each value.
    y1, x1 = state.corners[:, :1], state.corners[:, 1:2]
    last = BINS - 1
    bins = jnp.arange(BINS)
    boxes = jnp.select(
        [place == 0, place == 1, place == 2],
        [
            (last - bins) * (last * BINS // 2),
            (last - y1) * (last - bins),
            jnp.broadcast_to(last - x1, times.shape),
        ],
        1,
    )
    return times >= boxes


def _reveal_block(
    masked: Float[Array, "B V"],
    logits: Float[Array, "B V"],
    start: int,
    shown: Bool[Array, "B width"],
) -> Float[Array, "B V"]:
    """Puts logits of neighbouring tokens into `masked`, where `shown`."""
    block = slice(start, start + shown.shape[1])
    return masked.at[:, block].set(jnp.where(shown, logits[:, block], -jnp.inf))
