"""Answers of different lengths side by side in few rows of few widths, without much padding.

Letters: B prompts, T tokens of a pack.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from paligemma_jax.processing.buckets import bucket

TOKENS_AT_ONCE = 512  # of all prompts together; bounds memory, not the number of answers
MIN_WIDTH = 16
PADDING = -1


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the tokens of one answer stand: columns `start` to `start + length` of `row`."""

    row: int
    answer: int  # number among the row's answers
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class Pack:
    """Beginnings of answers: every token but the last (EOS), with the token that follows it.

    Attributes:
      tokens: i32[B, T].
      group: i32[B, T], number of the answer that a token belongs to; -1 on padding.
      targets: i32[B, T], the next token of the same answer.
      places: where each answer went.
    """

    tokens: np.ndarray
    group: np.ndarray
    targets: np.ndarray
    places: tuple[Place, ...]


def pack(answers: Sequence[Sequence[Sequence[int]]], rows: int) -> Iterator[Pack]:
    """Packs the answers of each prompt (ending in EOS) into rows; answers of EOS alone need none.

    Widths are powers of two, at least 16, at most 512 divided by `rows` or what the longest answer
    needs; so the programs that read packs are few, whatever the number of answers.
    """
    longest = max((len(answer) - 1 for row in answers for answer in row), default=0)
    limit = max(bucket(longest, MIN_WIDTH), TOKENS_AT_ONCE // bucket(rows))
    waiting = [
        [(number, answer) for number, answer in enumerate(row) if len(answer) > 1][::-1]
        for row in answers
    ]
    while any(waiting):
        taken = [_take(row, limit) for row in waiting]
        yield _lay_out(taken, rows)


def _take(waiting: list[tuple[int, Sequence[int]]], limit: int) -> list[tuple[int, Sequence[int]]]:
    """Removes from the end as many answers as fit into `limit` tokens."""
    taken, room = [], limit
    while waiting and len(waiting[-1][1]) - 1 <= room:
        taken.append(waiting.pop())
        room -= len(taken[-1][1]) - 1
    return taken


def _lay_out(taken: Sequence[Sequence[tuple[int, Sequence[int]]]], rows: int) -> Pack:
    used = max(sum(len(answer) - 1 for _, answer in row) for row in taken)
    shape = (rows, bucket(used, MIN_WIDTH))
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    group = np.full(shape, PADDING, np.int32)
    places = []
    for row, members in enumerate(taken):
        start = 0
        for number, answer in members:
            length = len(answer) - 1
            columns = slice(start, start + length)
            tokens[row, columns] = answer[:-1]
            targets[row, columns] = answer[1:]
            group[row, columns] = number
            places.append(Place(row, number, start, length))
            start += length
    return Pack(tokens, group, targets, tuple(places))
