"""How many edits lie between two sequences, in time n * m / machine word.

Sources: Levenshtein 1966; the bit-parallel forms are Hyyro 2003 (distance) and 2004 (longest
common subsequence), with a Python integer as the machine word.
"""

from collections.abc import Hashable, Sequence


def levenshtein(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """The least number of insertions, deletions and substitutions, each 1; of letters or words."""
    if not first:
        return len(second)
    size = len(first)
    full, last = (1 << size) - 1, 1 << (size - 1)
    where = _places(first)
    # Bit i of `up` (`down`): the distance of the first i + 1 items exceeds that of the first i by
    # one (falls short of it by one).
    up, down, distance = full, 0, size
    for item in second:
        match = where.get(item, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        right_up = down | ~(diagonal | up)
        right_down = up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up = (right_up << 1) | 1
        up = ((right_down << 1) | ~(diagonal | right_up)) & full
        down = right_up & diagonal & full
    return distance


def longest_common_subsequence(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest sequence that is in both, in order but not in one piece."""
    full = (1 << len(first)) - 1
    where = _places(first)
    rest = full
    for item in second:
        match = rest & where.get(item, 0)
        rest = ((rest + match) | (rest - match)) & full
    return len(first) - rest.bit_count()


def indel_similarity(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """2 LCS / (len + len) in 0..1, and 1 for two empty sequences.

    This is `Levenshtein.ratio` and `rapidfuzz`'s `fuzz.ratio / 100`: insertions and deletions
    alone, so not 1 - levenshtein / longest.
    """
    total = len(first) + len(second)
    return 2 * longest_common_subsequence(first, second) / total if total else 1.0


def normalized_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """`levenshtein` by the length of the longer one, in 0..1; 0 for two empty sequences."""
    longest = max(len(first), len(second))
    return levenshtein(first, second) / longest if longest else 0.0


def _places(sequence: Sequence[Hashable]) -> dict[Hashable, int]:
    where: dict[Hashable, int] = {}
    for place, item in enumerate(sequence):
        where[item] = where.get(item, 0) | (1 << place)
    return where
