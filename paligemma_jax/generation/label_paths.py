"""Labels of detection answers as the token sequences that the tokenizer really makes of them."""

import dataclasses
from collections.abc import Sequence

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.generation.allowed import faithful_ids
from paligemma_jax.generation.trie import ROOT, Edges, grow, walk
from paligemma_jax.processing import prompts
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
            f"The {what} holds a location or segmentation token, which would be read as a part of "
            "the box. Plain words fit. Leave out <loc....> and <seg...>."
        )
    return LabelPaths((*last, tokenizer.eos_id), tuple(again))
