"""Edit distances of text, and the metrics made of them: ANLS and error rates of recognized text.

Sources: Levenshtein 1966; the bit-parallel forms, with a Python integer as the machine word, are
Hyyro 2003 (distance) and 2004 (longest common subsequence).
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

from paligemma_jax.evaluation.metric import Metric, Values, check_text, check_texts


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


def anls_score(prediction: str, answers: Sequence[str], *, process: bool = True) -> float:
    """In 0..1: the best over the answers of 1 - d where d < 0.5, else 0.

    d is the Levenshtein distance by the length of the longer string; at exactly 0.5 the score is 0.
    `process` makes both sides lower case, strips them and turns every run of white space into one
    space, as the official evaluation does; big_vision, by whose rule PaliGemma is reported, makes
    lower case alone (pass lower-case strings and process=False). Source: Biten et al. 2019, Scene
    Text Visual Question Answering.
    """
    if process:
        prediction, *answers = (" ".join(t.lower().split()) for t in (prediction, *answers))
    distances = [normalized_distance(prediction, answer) for answer in answers]
    return max((1 - d if d < 0.5 else 0.0 for d in distances), default=0.0)


@dataclasses.dataclass(eq=False)
class ANLS(Metric):
    """`anls` in 0..1: mean of `anls_score`, and `acc`: fraction of answers without any error.

    A prediction is a string, a reference a list of at least one. For DocVQA (Mathew et al. 2021),
    InfographicVQA (Mathew et al. 2022) and ST-VQA (Biten et al. 2019).
    """

    process: bool = True
    main = "anls"
    expected = "a prediction (string) and at least one answer (a list of strings)"

    def _keep(self, prediction: Any, reference: Any) -> dict[str, float]:
        text, answers = check_text(prediction, "prediction"), check_texts(reference, "answer")
        if not self.process:
            text, answers = text.lower(), [answer.lower() for answer in answers]
        score = anls_score(text, answers, process=self.process)
        return {"anls": score, "acc": float(score == 1.0)}


@dataclasses.dataclass(eq=False)
class TextRecognition(Metric):
    """Error rates and similarities of recognized text; nothing is stripped or made lower case.

    `cer` and `wer`: all edits (`levenshtein`) of characters, and of words between white space, by
    all characters and words of the references; from 0 up, beyond 1 where much is invented. Without
    any in the references, the number of edits itself, as jiwer has it (Morris et al. 2004).
    `levenshtein_ratio`: mean of `indel_similarity` in 0..1, the measure of Roboflow's OCR
    benchmark. `edit_distance`: mean of `normalized_distance` in 0..1, as in maestro. `acc`:
    fraction without any error. A prediction and a reference are a string each; both may be empty.
    """

    main = "levenshtein_ratio"
    expected = "a prediction (string) and the right text (string)"

    def _keep(self, prediction: Any, reference: Any) -> dict[str, float]:
        text, right = check_text(prediction, "prediction"), check_text(reference, "text")
        words, right_words = text.split(), right.split()
        return {
            "ratio": indel_similarity(text, right),
            "distance": normalized_distance(text, right),
            "acc": float(text == right),
            "character_edits": levenshtein(text, right),
            "characters": len(right),
            "word_edits": levenshtein(words, right_words),
            "words": len(right_words),
        }

    def _summarize(self, sums: Values, means: Values) -> Values:
        return {
            "cer": sums["character_edits"] / sums["characters"].clip(1),
            "wer": sums["word_edits"] / sums["words"].clip(1),
            "levenshtein_ratio": means["ratio"],
            "edit_distance": means["distance"],
            "acc": means["acc"],
        }
