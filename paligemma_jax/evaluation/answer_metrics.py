"""Whether an answer is one of the right ones, to the letter.

Accuracy of an answer that names one of given options.

Accuracy of questions that count only where all about one thing are right.

Yes or no: accuracy, precision, recall, F1 and how often the answer is yes.

Accuracy and error of counts.

Accuracy that forgives a number 5 %, for answers read from charts.

The official treatment of answers of VQAv2 before they are compared.

Source: the evaluation code of VQA (Antol et al. 2015; Goyal et al. 2017), as described at
visualqa.org/evaluation.html. Its slips are part of the definition and kept: a comma between two
digits anywhere makes all punctuation vanish, and any point not before a digit is dropped.

How many edits lie between two sequences, in time n * m / machine word.

Sources: Levenshtein 1966; the bit-parallel forms are Hyyro 2003 (distance) and 2004 (longest
common subsequence), with a Python integer as the machine word.

Average normalized Levenshtein similarity, for answers read from documents.

Accuracy of an answer that several people were asked for.

How well text was read from a picture.

How likely the right text is to the model.
"""

import dataclasses
import math
import re
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from paligemma_jax.evaluation.metric import (
    Accumulator,
    Examples,
    MeanAccumulator,
    Measure,
    Misfit,
    Totals,
    TotalsAccumulator,
    Values,
    check_number,
    check_text,
    check_texts,
    divide,
    refuse,
)


def is_exact(prediction: str, answers: str | Sequence[str], *, lower: bool = False) -> bool:
    """Is the prediction, without white space around it, one of the answers?

    `lower` makes both lower case first. Nothing else is forgiven: no article, point or plural.
    """
    prediction, answers = prediction.strip(), [answers] if isinstance(answers, str) else answers
    if lower:
        return prediction.lower() in {answer.strip().lower() for answer in answers}
    return prediction in {answer.strip() for answer in answers}


class ExactMatch(MeanAccumulator):
    """`acc` in 0..1: share of predictions that are one of the right answers (`is_exact`).

    A prediction is a string, a reference a string or a list of them. This is the measure of GQA and
    xGQA (Hudson and Manning 2019; Pfeiffer et al. 2022), NLVR2 and MaRVL (Suhr et al. 2019; Liu et
    al. 2021; answers True and False), OCR-VQA (Mishra et al. 2019), AI2D (Kembhavi et al. 2016),
    A-OKVQA's multiple choice (Schwenk et al. 2022; the answer is the text of the choice) and of
    questions about videos (MSVD, MSRVTT: Xu et al. 2017; ActivityNet: Yu et al. 2019), as in the
    PaliGemma reports. Toolkits that drop case and punctuation give other numbers for GQA.
    """

    main = "acc"
    fits = "A prediction (string) and its answer (a string, or a list of strings) fit."

    def __init__(self, lower: bool = False):
        super().__init__()
        self.lower = lower

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction")
        if not isinstance(reference, list | tuple):
            reference = [check_text(reference, "answer")]
        answers = check_texts(reference, "answer")
        return {"acc": float(is_exact(text, answers, lower=self.lower))}


def exact_match(
    predictions: Examples[str],
    references: Examples[Any],
    *,
    lower: bool = False,
) -> dict[str, float]:
    """`ExactMatch` of lists or mappings; raises DatasetError."""
    return ExactMatch(lower).add_all(predictions, references).result()


_LETTER = re.compile(r"the answer is ([a-z])\.")


def option_letter(text: str) -> str | None:
    """The letter of an answer that begins "The answer is X.", in lower case; else None."""
    found = _LETTER.match(text.lower())
    return found[1] if found else None


class OptionLetterAccuracy(MeanAccumulator):
    """`acc` and `parsefail`, both in 0..1, of answers such as "The answer is B."

    A prediction is right if `option_letter` reads the right letter from it; `parsefail` is the
    share in which it reads none, which are wrong. A prediction is a string, a reference the letter
    or the whole right answer. Source: Lu et al. 2022, ScienceQA, in big_vision's form (there, a
    reference that cannot be read equals a prediction that cannot; here it does not fit).
    """

    main = "acc"
    fits = 'A prediction (string) and the letter ("b", or "The answer is B.") fit.'

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        found = option_letter(check_text(prediction, "prediction"))
        text = check_text(reference, "answer").strip()
        right = text.lower() if len(text) == 1 and text.isalpha() else option_letter(text)
        if right is None:
            raise Misfit(f"the answer {text[:40]!r} names no letter")
        return {"acc": float(found == right), "parsefail": float(found is None)}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The texts to choose from, and which of them is right."""

    choices: tuple[str, ...]
    answer: str


class ChoiceAccuracy(MeanAccumulator):
    """`acc` in 0..1: share of predictions that are the text of the right choice.

    Outer white space does not count; case does, as choices may differ in it alone. `no_choice` is
    the share of predictions that are none of the choices, which are wrong. A prediction is a
    string, a reference a `Choice`. For A-OKVQA (Schwenk et al. 2022) and AI2D (Kembhavi et al.
    2016), prompted with the choices.
    """

    main = "acc"
    fits = "A prediction (string) and a Choice(choices, answer) with its answer among them fit."

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction").strip()
        if not isinstance(reference, Choice):
            raise Misfit(f"the reference is of type {type(reference).__name__}, not Choice")
        choices = [c.strip() for c in check_texts(reference.choices, "choice")]
        answer = check_text(reference.answer, "answer").strip()
        if answer not in choices:
            raise Misfit(f"the answer {answer!r} is none of the choices {choices}")
        return {"acc": float(text == answer), "no_choice": float(text not in choices)}


def option_letter_accuracy(
    predictions: Examples[str], references: Examples[str]
) -> dict[str, float]:
    """`OptionLetterAccuracy` of lists or mappings; raises DatasetError."""
    return OptionLetterAccuracy().add_all(predictions, references).result()


def choice_accuracy(
    predictions: Examples[str],
    references: Examples[Choice],
) -> dict[str, float]:
    """`ChoiceAccuracy` of lists or mappings; raises DatasetError."""
    return ChoiceAccuracy().add_all(predictions, references).result()


@dataclasses.dataclass(frozen=True)
class OfPair:
    """The right answer to a question, and the name of the pair that the question belongs to."""

    pair: str | int
    answer: str


class PairedAccuracy(Accumulator):
    """`pair_acc` in 0..1: share of pairs of which both answers are right; `acc`: of all answers.

    Stripped and lower-case answers are compared. A prediction is a string, a reference an
    `OfPair`; every pair must have `size` questions by the end. Source: Tong et al. 2024, MMVP (150
    pairs). With the pair being one sentence over several pictures this is NLVR2's consistency
    (Suhr et al. 2019), whose groups differ in size: size=None.
    """

    fits = "A prediction (string) and an OfPair(pair, answer) fit."

    def __init__(self, size: int | None = 2):
        super().__init__()
        self.size = size

    def _row(self, prediction: Any, reference: Any) -> tuple[str | int, bool]:
        text = check_text(prediction, "prediction")
        if not isinstance(reference, OfPair):
            raise Misfit(f"the reference is of type {type(reference).__name__}, not OfPair")
        return reference.pair, is_exact(text, check_text(reference.answer, "answer"), lower=True)

    def _measure(self, rows: Sequence[tuple[str | int, bool]]) -> Measure:
        members: dict[str | int, list[int]] = {}
        for place, (pair, _) in enumerate(rows):
            members.setdefault(pair, []).append(place)
        wrong = {p: len(m) for p, m in members.items() if self.size and len(m) != self.size}
        if wrong:
            raise refuse(
                [f"{pair!r} has {count} questions" for pair, count in wrong.items()],
                f"Pairs of {self.size} questions fit.",
                "Add what is missing, or: PairedAccuracy(size=None)",
            )
        right = np.array([row[1] for row in rows], np.float64)
        first = np.array([places[0] for places in members.values()])
        both = np.array([right[places].all() for places in members.values()], np.float64)

        def measure(weights: np.ndarray) -> Values:
            pairs = weights[:, first]  # all members of a pair weigh alike
            return {
                "pair_acc": divide(pairs @ both, pairs.sum(axis=1)),
                "acc": divide(weights @ right, weights.sum(axis=1)),
            }

        return measure

    def _scores(self, rows: Sequence[tuple[str | int, bool]]) -> np.ndarray:
        return np.array([right for _, right in rows], np.float64)

    def _row_units(self, rows: Sequence[tuple[str | int, bool]]) -> list[Hashable]:
        return [pair for pair, _ in rows]


def paired_accuracy(
    predictions: Examples[str],
    references: Examples[OfPair],
    *,
    size: int | None = 2,
) -> dict[str, float]:
    """`PairedAccuracy` of lists or mappings; raises DatasetError."""
    return PairedAccuracy(size).add_all(predictions, references).result()


class YesNo(TotalsAccumulator):
    """Figures in 0..1 of answers that should be yes or no, yes being the positive one.

    `acc` is the share of right answers, `precision` that of right ones among the answers yes,
    `recall` that of yes among the questions to which it is right, `f1` their harmonic mean,
    `yes_ratio` the share of answers that are yes, and `valid` that of answers that are yes or no.
    Answers are stripped and made lower case; any other is wrong, and counts as not yes. Precision
    is 0 if no answer is yes, recall if none should be. A prediction and a reference are a string
    each, or a reference a bool. Source: Li et al. 2023, POPE, reported for its splits random,
    popular and adversarial: `ByGroup(YesNo(), {"mean": None})`. (lmms-eval's yes-ratio is that of
    the references.)
    """

    main = "acc"
    fits = 'A prediction (string) and "yes" or "no" (or a bool) fit.'

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction").strip().lower()
        if isinstance(reference, bool):
            reference = "yes" if reference else "no"
        right = check_text(reference, "answer").strip().lower()
        if right not in ("yes", "no"):
            raise Misfit(f"the answer {reference!r} is neither yes nor no")
        return {
            "acc": float(text == right),
            "hit": float(text == right == "yes"),
            "yes": float(text == "yes"),
            "positive": float(right == "yes"),
            "valid": float(text in ("yes", "no")),
        }

    def _finish(self, totals: Totals) -> Values:
        precision = totals.ratio("hit", "yes", empty=0.0)
        recall = totals.ratio("hit", "positive", empty=0.0)
        return {
            "acc": totals.mean("acc"),
            "precision": precision,
            "recall": recall,
            "f1": divide(2 * precision * recall, precision + recall, 0.0),
            "yes_ratio": totals.mean("yes"),
            "valid": totals.mean("valid"),
        }

    def confusion(self) -> dict[str, dict[str, int]]:
        """How often each right answer (first key) was given each answer: yes, no or other."""
        answers = ("yes", "no", "other")
        counts = {right: {answer: 0 for answer in answers} for right in ("yes", "no")}
        for row in self._rows.values():
            given = "yes" if row["yes"] else "no" if row["valid"] else "other"
            counts["yes" if row["positive"] else "no"][given] += 1
        return counts


def yes_no(
    predictions: Examples[str],
    references: Examples[str | bool],
) -> dict[str, float]:
    """`YesNo` of lists or mappings; raises DatasetError."""
    return YesNo().add_all(predictions, references).result()


_counting_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
_counting_NUMBERS = {"none": 0} | {word: number for number, word in enumerate(_counting_WORDS)}


def read_count(text: str) -> int | None:
    """The number that an answer is as a whole: digits, or a word from none and zero to twenty.

    Case and outer white space do not count; None for anything else, such as "two cats" or "2.5",
    and for more than 15 digits.
    """
    text = text.strip().lower()
    if text in _counting_NUMBERS:
        return _counting_NUMBERS[text]
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 15 else None


class CountAccuracy(TotalsAccumulator):
    """`acc` in 0..1, share of right counts, and how far the others are off.

    `mae` is the mean of |prediction - truth| and `rmse` the root of the mean square, over the
    predictions that are a count by `read_count`; `no_number` is the share of those that are none,
    which are wrong. A prediction is a string, a reference an int from 0 up, or its digits. For
    TallyQA (Acharya et al. 2019), reported for simple and complex questions: `ByGroup(...)`; and
    for CountBenchQA (Paiss et al. 2023; PaliGemma report). big_vision compares the same way.
    """

    main = "acc"
    fits = "A prediction (string) and the count (int) fit."

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        found = read_count(check_text(prediction, "prediction"))
        if isinstance(reference, str) and read_count(reference) is not None:
            reference = read_count(reference)
        truth = check_number(reference, "count", low=0)
        if found is None:
            return {"acc": 0.0, "no_number": 1.0}
        error = abs(found - truth)
        row = {"acc": float(error == 0), "no_number": 0.0}
        return row | {"error": error, "square": error**2, "counts": 1.0}

    def _finish(self, totals: Totals) -> Values:
        values = {"acc": totals.mean("acc"), "no_number": totals.mean("no_number")}
        if "counts" in totals.sums:
            counts = totals.sums["counts"]
            values["mae"] = divide(totals.sums["error"], counts)
            values["rmse"] = np.sqrt(divide(totals.sums["square"], counts))
        return values


def count_accuracy(predictions: Examples[str], references: Examples[int]) -> dict[str, float]:
    """`CountAccuracy` of lists or mappings; raises DatasetError."""
    return CountAccuracy().add_all(predictions, references).result()


TOLERANCE = 0.05


def is_relaxed_match(
    prediction: str, answer: str, *, tolerance: float = TOLERANCE, lower: bool = True
) -> bool:
    """Are both numbers, with |prediction - answer| <= tolerance * |answer|, or else equal strings?

    A percent sign at the end divides by 100, so 5% and 0.05 are equal. An answer of 0, and numbers
    that are not finite, are compared as strings. Strings are stripped, and made lower case with
    `lower`, big_vision's setting. Source: Masry et al. 2022, ChartQA; after Methani et al. 2020.
    """
    right, given = _number(answer), _number(prediction)
    if right and given is not None:
        return abs(given - right) <= tolerance * abs(right)
    return _equal(prediction, answer, lower=lower)


class RelaxedAccuracy(MeanAccumulator):
    """`relaxed_acc` in 0..1: share of `is_relaxed_match`; and `acc`, of equal strings.

    A prediction and a reference are a string each. ChartQA's published number is the mean over the
    splits human and augmented: `ByGroup(RelaxedAccuracy(), {"mean": ("human", "augmented")})`.
    """

    main = "relaxed_acc"
    fits = "A prediction (string) and its answer (string) fit."

    def __init__(self, tolerance: float = TOLERANCE, lower: bool = True):
        super().__init__()
        self.tolerance = tolerance
        self.lower = lower

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text, answer = check_text(prediction, "prediction"), check_text(reference, "answer")
        relaxed = is_relaxed_match(text, answer, tolerance=self.tolerance, lower=self.lower)
        return {
            "relaxed_acc": float(relaxed),
            "acc": float(_equal(text, answer, lower=self.lower)),
        }


def relaxed_accuracy(
    predictions: Examples[str],
    references: Examples[str],
    *,
    tolerance: float = TOLERANCE,
    lower: bool = True,
) -> dict[str, float]:
    """`RelaxedAccuracy` of lists or mappings; raises DatasetError."""
    return RelaxedAccuracy(tolerance, lower).add_all(predictions, references).result()


def _equal(first: str, second: str, *, lower: bool) -> bool:
    first, second = first.strip(), second.strip()
    return first.lower() == second.lower() if lower else first == second


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_POINT = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_vqa_processing_NUMBERS = "zero one two three four five six seven eight nine ten".split()

# An answer that lacks one apostrophe of these gets it back.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _without_one_apostrophe() -> dict[str, str]:
    words = {}
    for word in _CONTRACTIONS:
        for place, letter in enumerate(word):
            if letter == "'":
                words[word[:place] + word[place + 1 :]] = word
    return words


# The one with "somebody'd" is a slip of the official list, the wrong way round.
_vqa_processing_WORDS = (
    _without_one_apostrophe()
    | {"somebody'd": "somebodyd", "none": "0"}
    | {word: str(number) for number, word in enumerate(_vqa_processing_NUMBERS)}
)


def strip_space(text: str) -> str:
    """Line breaks and tabs become spaces, and white space around the answer goes."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def process_answer(text: str) -> str:
    """Lower case, without articles and most punctuation, number words to ten as digits.

    Of ; / [ ] " { } ( ) = + \\ _ - > < @ ` , ? ! each is dropped if it stands beside a space
    somewhere in the answer or if the answer has a comma between digits, else it becomes a space.
    """
    commas = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if commas or beside_space else " ")
    out = _POINT.sub("", out)
    return " ".join(
        _vqa_processing_WORDS.get(word, word)
        for word in out.lower().split()
        if word not in _ARTICLES
    )


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


THRESHOLD = 0.5


def anls_score(
    prediction: str, answers: Sequence[str], *, threshold: float = THRESHOLD, process: bool = True
) -> float:
    """In 0..1: the best over the answers of 1 - d where d < threshold, else 0.

    d is the Levenshtein distance by the length of the longer string; at exactly the threshold the
    score is 0. `process` makes both sides lower case, strips them and turns every run of white
    space into one space, as the official evaluation does; big_vision, by whose rule PaliGemma is
    reported, makes lower case alone (pass lower-case strings and process=False). Source: Biten et
    al. 2019, Scene Text Visual Question Answering.
    """
    if process:
        prediction, answers = _processed(prediction), [_processed(answer) for answer in answers]
    distances = [normalized_distance(prediction, answer) for answer in answers]
    return max((1 - d if d < threshold else 0.0 for d in distances), default=0.0)


class ANLS(MeanAccumulator):
    """`anls` in 0..1: mean of `anls_score`, and `acc`: share of answers without any error.

    A prediction is a string, a reference a list of at least one. For DocVQA (Mathew et al. 2021),
    InfographicVQA (Mathew et al. 2022) and ST-VQA (Biten et al. 2019).
    """

    main = "anls"
    fits = "A prediction (string) and at least one answer (a list of strings) fit."

    def __init__(self, threshold: float = THRESHOLD, process: bool = True):
        super().__init__()
        self.threshold = threshold
        self.process = process

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text, answers = check_text(prediction, "prediction"), check_texts(reference, "answer")
        if not self.process:
            text, answers = text.lower(), [answer.lower() for answer in answers]
        score = anls_score(text, answers, threshold=self.threshold, process=self.process)
        return {"anls": score, "acc": float(score == 1.0)}


def anls(
    predictions: Examples[str],
    references: Examples[Sequence[str]],
    *,
    threshold: float = THRESHOLD,
    process: bool = True,
) -> dict[str, float]:
    """`ANLS` of lists or mappings; raises DatasetError."""
    return ANLS(threshold, process).add_all(predictions, references).result()


def _processed(text: str) -> str:
    return " ".join(text.lower().split())


PEOPLE = 10  # answers to each question of VQAv2, TextVQA and VizWiz


def vqa_v2_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """In 0..1: the mean, over leaving out each answer, of min(1, matches among the others / 3).

    Both sides have white space stripped; unless all answers are then the same, both go through
    `process_answer`. Sources: Antol et al. 2015 and Goyal et al. 2017 (VQA, VQAv2), and big_vision,
    which treats VQAv2 and TextVQA so.
    """
    prediction, answers = strip_space(prediction), [strip_space(a) for a in answers]
    if len(set(answers)) > 1:
        prediction, answers = process_answer(prediction), [process_answer(a) for a in answers]
    matches = sum(answer == prediction for answer in answers)
    misses = len(answers) - matches
    if not matches:
        return 0.0
    # Leaving out one of the matching answers leaves matches - 1, leaving out another all.
    return (matches * min(1, (matches - 1) / 3) + misses * min(1, matches / 3)) / len(answers)


def simple_vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """In 0..1: min(1, matches / 3), to the letter.

    big_vision's rule for OKVQA, A-OKVQA (direct answer) and VizWiz: nothing is processed and no
    answer left out, so the number is not that of the official evaluation of those.
    """
    return min(1.0, sum(answer == prediction for answer in answers) / 3)


class VQAv2Accuracy(MeanAccumulator):
    """`acc` in 0..1: mean of `vqa_v2_accuracy`. For VQAv2, TextVQA, and VizWiz's official number.

    A prediction is a string, a reference a list of exactly `people` strings.
    """

    main = "acc"

    def __init__(self, people: int = PEOPLE):
        super().__init__()
        self.people = people
        self.fits = f"A prediction (string) and {people} answers (a list of strings) fit."

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction")
        return {"acc": vqa_v2_accuracy(text, check_texts(reference, "answer", self.people))}


class SimpleVQAAccuracy(MeanAccumulator):
    """`acc`, `acc_any` and `anls`, all in 0..1: means of big_vision's three figures.

    They are `simple_vqa_accuracy`, whether any answer matches, and the best `anls_score` without
    stripping; `lower` makes both sides lower case first. A prediction is a string, a reference a
    list of at least one. For OKVQA (Marino et al. 2019), A-OKVQA (Schwenk et al. 2022), VizWiz
    (Gurari et al. 2018).
    """

    main = "acc"
    fits = "A prediction (string) and at least one answer (a list of strings) fit."

    def __init__(self, lower: bool = False):
        super().__init__()
        self.lower = lower

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction")
        answers = check_texts(reference, "answer")
        if self.lower:
            text, answers = text.lower(), [answer.lower() for answer in answers]
        return {
            "acc": simple_vqa_accuracy(text, answers),
            "acc_any": float(text in answers),
            "anls": anls_score(text, answers, process=False),
        }


def vqa_v2(
    predictions: Examples[str],
    references: Examples[Sequence[str]],
) -> dict[str, float]:
    """`VQAv2Accuracy` of lists or mappings; raises DatasetError."""
    return VQAv2Accuracy().add_all(predictions, references).result()


def simple_vqa(
    predictions: Examples[str],
    references: Examples[Sequence[str]],
    *,
    lower: bool = False,
) -> dict[str, float]:
    """`SimpleVQAAccuracy` of lists or mappings; raises DatasetError."""
    return SimpleVQAAccuracy(lower).add_all(predictions, references).result()


class Reading(TotalsAccumulator):
    """Error rates and similarities of recognised text; nothing is stripped or made lower case.

    `cer` and `wer`: all edits (`levenshtein`) of characters, and of words between white space, by
    all characters and words of the references; from 0 up, beyond 1 where much is invented. Without
    any in the references, the number of edits itself, as jiwer has it (Morris et al. 2004).
    `levenshtein_ratio`: mean of `indel_similarity` in 0..1, the measure of Roboflow's OCR
    benchmark. `edit_distance`: mean of `normalized_distance` in 0..1, as in maestro. `acc`: share
    without any error. A prediction and a reference are a string each; both may be empty.
    """

    main = "ratio"
    fits = "A prediction (string) and the right text (string) fit."

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
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

    def _finish(self, totals: Totals) -> Values:
        sums = totals.sums
        return {
            "cer": sums["character_edits"] / sums["characters"].clip(1),
            "wer": sums["word_edits"] / sums["words"].clip(1),
            "levenshtein_ratio": totals.mean("ratio"),
            "edit_distance": totals.mean("distance"),
            "acc": totals.mean("acc"),
        }


def reading(predictions: Examples[str], references: Examples[str]) -> dict[str, float]:
    """`Reading` of lists or mappings; raises DatasetError."""
    return Reading().add_all(predictions, references).result()


class Perplexity(TotalsAccumulator):
    """Negative log-likelihood of the right answers, in nats.

    An example is a pair: its log-probability, summed over its tokens (at most 0), as the
    "prediction", and how many tokens those are (at least 1), as the "reference". `nll`: mean per
    example; `nll_per_token`: mean over examples of each one's mean per token, which big_vision
    calls `avg` of its perplexity; `nll_of_all_tokens`: all nats by all tokens; `perplexity`: exp of
    that, from 1 up (Jelinek et al. 1977).
    """

    main = "logprob_per_token"
    fits = "A log-probability in nats (at most 0) and a number of tokens (at least 1) fit."

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        tokens = check_number(reference, "number of tokens", low=1)
        # The other way round, so that one check is enough: at most 0, finite.
        nll = check_number(_negated(prediction), "negative log-probability", low=0)
        return {"nll": nll, "tokens": tokens, "logprob_per_token": -nll / tokens}

    def _finish(self, totals: Totals) -> Values:
        together = totals.ratio("nll", "tokens")
        return {
            "nll": totals.mean("nll"),
            "nll_per_token": -totals.mean("logprob_per_token"),
            "nll_of_all_tokens": together,
            "perplexity": np.exp(np.minimum(together, 700)),  # beyond, there is no such float
        }


def perplexity(logprobs: Examples[float], tokens: Examples[int]) -> dict[str, float]:
    """`Perplexity` of lists or mappings; raises DatasetError."""
    return Perplexity().add_all(logprobs, tokens).result()


def _negated(value: Any) -> Any:
    return -value if isinstance(value, float | int | np.floating | np.integer) else value
