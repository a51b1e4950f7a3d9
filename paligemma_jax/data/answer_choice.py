"""One of several answers to learn from."""

import collections
import dataclasses
import zlib

import numpy as np

from paligemma_jax.data.record import Record


@dataclasses.dataclass(frozen=True)
class RandomAnswer:
    """Any of the answers, each as likely as it is often among them: big_vision's `choice`."""

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if len(record.answers) < 2:
            return _only(record, record.suffix)
        return _only(record, record.answers[int(rng.integers(len(record.answers)))])


@dataclasses.dataclass(frozen=True)
class EachAnswerInTurn:
    """Another answer every epoch, until all have come: big_vision's `choice_no_replacement`.

    The order is random, and another one for each record.
    """

    seed: int = 0

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        count = len(record.answers)
        if count < 2:
            return _only(record, record.suffix)
        return _only(record, record.answers[place_in_turn(record, count, self.seed)])


@dataclasses.dataclass(frozen=True)
class MostFrequentAnswer:
    """The answer that most annotators gave, of equals the first: big_vision's `majority`."""

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        if len(record.answers) < 2:
            return _only(record, record.suffix)
        return _only(record, collections.Counter(record.answers).most_common(1)[0][0])


def place_in_turn(record: Record, count: int, seed: int) -> int:
    """Which of `count` things comes in the record's epoch, each once before any comes again."""
    # A new order for each round, by the record's name: nothing has to be remembered.
    turn, place = divmod(record.epoch, count)
    key = [seed, turn, zlib.crc32(record.id.encode("utf-8", "replace"))]
    return int(np.random.default_rng(key).permutation(count)[place])


def _only(record: Record, answer: str) -> Record:
    return dataclasses.replace(record, suffix=answer, answers=())
