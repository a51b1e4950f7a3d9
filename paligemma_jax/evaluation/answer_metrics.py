"""Metrics of short answers: exact match, choices, yes or no, counts, relaxed and VQA accuracy, and
the likelihood of right answers.
"""

import dataclasses
import math
import re
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from paligemma_jax.evaluation.metric import (
    InvalidExample,
    Measure,
    Metric,
    Values,
    check_number,
    check_text,
    check_texts,
    divide,
)
from paligemma_jax.evaluation.text_metrics import anls_score


def is_exact(prediction: str, answers: Sequence[str], *, lower: bool = False) -> bool:
    """Whether the prediction, without white space around it, is one of the answers.

    `lower` makes both lower case first. Nothing else is forgiven: no article, point or plural.
    """
    if lower:
        prediction, answers = prediction.lower(), [answer.lower() for answer in answers]
    return prediction.strip() in {answer.strip() for answer in answers}


@dataclasses.dataclass(eq=False)
class ExactMatch(Metric):
    """`acc` in 0..1: fraction of predictions that are one of the right answers (`is_exact`).

    A prediction is a string, a reference a string or a list of them. This is the measure of GQA and
    xGQA (Hudson and Manning 2019; Pfeiffer et al. 2022), NLVR2 and MaRVL (Suhr et al. 2019; Liu et
    al. 2021; answers True and False), OCR-VQA (Mishra et al. 2019) and of questions about videos
    (MSVD, MSRVTT: Xu et al. 2017; ActivityNet: Yu et al. 2019), as in the PaliGemma reports.
    Toolkits that drop case and punctuation give other numbers for GQA.
    """

    lower: bool = False
    main = "acc"
    expected = "a prediction (string) and its answer (a string, or a list of strings)"

    def _keep(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction")
        if not isinstance(reference, list | tuple):
            reference = [check_text(reference, "answer")]
        answers = check_texts(reference, "answer")
        return {"acc": float(is_exact(text, answers, lower=self.lower))}


_LETTER = re.compile(r"the answer is ([a-z])\.")


def option_letter(text: str) -> str | None:
    """The letter of an answer that begins "The answer is X.", in lower case; else None."""
    found = _LETTER.match(text.lower())
    return found[1] if found else None


@dataclasses.dataclass(eq=False)
class OptionLetterAccuracy(Metric):
    """`acc` and `parsefail`, both in 0..1, of answers such as "The answer is B."

    A prediction is right if `option_letter` reads the right letter from it; `parsefail` is the
    fraction in which it reads none, which are wrong. A prediction is a string, a reference the
    letter or the whole right answer. Source: Lu et al. 2022, ScienceQA, in big_vision's form
    (there, a reference that cannot be read equals a prediction that cannot; here it is an error).
    """

    main = "acc"
    expected = 'a prediction (string) and the letter ("b", or "The answer is B.")'

    def _keep(self, prediction: Any, reference: Any) -> dict[str, float]:
        found = option_letter(check_text(prediction, "prediction"))
        text = check_text(reference, "answer").strip()
        right = text.lower() if len(text) == 1 and text.isalpha() else option_letter(text)
        if right is None:
            raise InvalidExample(f"the answer {text[:40]!r} names no letter")
        return {"acc": float(found == right), "parsefail": float(found is None)}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The texts to choose from, and which of them is right."""

    choices: tuple[str, ...]
    answer: str


@dataclasses.dataclass(eq=False)
class ChoiceAccuracy(Metric):
    """`acc` in 0..1: fraction of predictions that are the text of the right choice.

    Outer white space does not count; case does, as choices may differ in it alone. `no_choice` is
    the fraction of predictions that are none of the choices, which are wrong. A prediction is a
    string, a reference a `Choice`. For A-OKVQA (Schwenk et al. 2022) and AI2D (Kembhavi et al.
    2016), prompted with the choices.
    """

    main = "acc"
    expected = "a prediction (string) and a Choice(choices, answer) with the answer among them"

    def _keep(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction").strip()
        if not isinstance(reference, Choice):
            raise InvalidExample(f"expected a Choice, got a {type(reference).__name__}")
        choices = [c.strip() for c in check_texts(reference.choices, "choice")]
        answer = check_text(reference.answer, "answer").strip()
        if answer not in choices:
            raise InvalidExample(f"the answer {answer!r} is none of the choices {choices}")
        return {"acc": float(text == answer), "no_choice": float(text not in choices)}


@dataclasses.dataclass(frozen=True)
class PairAnswer:
    """The right answer to a question, and the name of the pair that the question belongs to."""

    pair: str | int
    answer: str


@dataclasses.dataclass(eq=False)
class PairedAccuracy(Metric):
    """`pair_acc` in 0..1: fraction of pairs of which all answers are right; `acc`: of all answers.

    Stripped and lower-case answers are compared. A prediction is a string, a reference a
    `PairAnswer`. Source: Tong et al. 2024, MMVP (150 pairs). With the pair being one sentence over
    several images this is NLVR2's consistency (Suhr et al. 2019).
    """

    expected = "a prediction (string) and a PairAnswer(pair, answer)"

    def _keep(self, prediction: Any, reference: Any) -> tuple[str | int, bool]:
        text = check_text(prediction, "prediction")
        if not isinstance(reference, PairAnswer):
            raise InvalidExample(f"expected a PairAnswer, got a {type(reference).__name__}")
        if not isinstance(reference.pair, str | int):
            raise InvalidExample(
                f"expected the pair to be a name or number, got {reference.pair!r}"
            )
        return reference.pair, is_exact(text, [check_text(reference.answer, "answer")], lower=True)

    def _measure(self, kept: Sequence[tuple[str | int, bool]]) -> Measure:
        members: dict[str | int, list[int]] = {}
        for place, (pair, _) in enumerate(kept):
            members.setdefault(pair, []).append(place)
        right = self._example_scores(kept)
        first = np.array([places[0] for places in members.values()])
        both = np.array([right[places].all() for places in members.values()], np.float64)

        def measure(weights: np.ndarray) -> Values:
            pairs = weights[:, first]  # all members of a pair weigh alike
            return {
                "pair_acc": divide(pairs @ both, pairs.sum(axis=1)),
                "acc": divide(weights @ right, weights.sum(axis=1)),
            }

        return measure

    def _example_scores(self, kept: Sequence[tuple[str | int, bool]]) -> np.ndarray:
        return np.array([right for _, right in kept], np.float64)

    def _unit(self, kept: tuple[str | int, bool]) -> Hashable:
        return kept[0]


@dataclasses.dataclass(eq=False)
class YesNo(Metric):
    """Scores in 0..1 of answers that should be yes or no, yes being the positive one.

    `acc` is the fraction of right answers, `precision` that of right ones among the answers yes,
    `recall` that of yes among the questions to which it is right, `f1` their harmonic mean,
    `yes_ratio` the fraction of answers that are yes, and `valid` that of answers that are yes or
    no. Answers are stripped and made lower case; any other is wrong, and counts as not yes.
    Precision is 0 if no answer is yes, recall if none should be. A prediction and a reference are a
    string each, or a reference a bool. Source: Li et al. 2023, POPE, reported as the mean of its
    splits random, popular and adversarial: `YesNo(averages={"mean": None})`. (lmms-eval's yes-ratio
    is that of the references.)
    """

    main = "acc"
    expected = 'a prediction (string) and "yes" or "no" (or a bool)'

    def _keep(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction").strip().lower()
        if isinstance(reference, bool):
            reference = "yes" if reference else "no"
        right = check_text(reference, "answer").strip().lower()
        if right not in ("yes", "no"):
            raise InvalidExample(f"the answer {reference!r} is neither yes nor no")
        return {
            "acc": float(text == right),
            "hit": float(text == right == "yes"),
            "yes": float(text == "yes"),
            "positive": float(right == "yes"),
            "valid": float(text in ("yes", "no")),
        }

    def _summarize(self, sums: Values, means: Values) -> Values:
        precision = divide(sums["hit"], sums["yes"], 0.0)
        recall = divide(sums["hit"], sums["positive"], 0.0)
        return {
            "acc": means["acc"],
            "precision": precision,
            "recall": recall,
            "f1": divide(2 * precision * recall, precision + recall, 0.0),
            "yes_ratio": means["yes"],
            "valid": means["valid"],
        }


_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
_NUMBERS = {"none": 0} | {word: number for number, word in enumerate(_NUMBER_WORDS)}


def read_count(text: str) -> int | None:
    """The number that an answer is as a whole: digits, or a word from none and zero to twenty.

    Case and outer white space do not count; None for anything else, such as "two cats" or "2.5",
    and for more than 15 digits.
    """
    text = text.strip().lower()
    if text in _NUMBERS:
        return _NUMBERS[text]
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 15 else None


@dataclasses.dataclass(eq=False)
class CountAccuracy(Metric):
    """`acc` in 0..1, fraction of right counts, and how far the others are off.

    `mae` is the mean of |prediction - truth| and `rmse` the root of the mean square, over the
    predictions that are a count by `read_count`; `no_number` is the fraction of those that are
    none, which are wrong. A prediction is a string, a reference an int from 0 up, or its digits.
    For TallyQA (Acharya et al. 2019), reported for the groups simple and complex, and for
    CountBenchQA (Paiss et al. 2023; PaliGemma report). big_vision compares the same way.
    """

    main = "acc"
    expected = "a prediction (string) and the count (int)"

    def _keep(self, prediction: Any, reference: Any) -> dict[str, float]:
        found = read_count(check_text(prediction, "prediction"))
        if isinstance(reference, str) and read_count(reference) is not None:
            reference = read_count(reference)
        truth = check_number(reference, "count", low=0)
        if found is None:
            return {"acc": 0.0, "no_number": 1.0}
        error = abs(found - truth)
        return {"acc": float(error == 0), "no_number": 0.0, "error": error, "square": error**2}

    def _summarize(self, sums: Values, means: Values) -> Values:
        values = {"acc": means["acc"], "no_number": means["no_number"]}
        if "error" in means:
            values["mae"] = means["error"]
            values["rmse"] = np.sqrt(means["square"])
        return values


TOLERANCE = 0.05


def is_relaxed_match(prediction: str, answer: str, *, lower: bool = True) -> bool:
    """Are both numbers, with |prediction - answer| <= 0.05 * |answer|, or else equal strings?

    A percent sign at the end divides by 100, so 5% and 0.05 are equal. An answer of 0, and numbers
    that are not finite, are compared as strings. Strings are stripped, and made lower case with
    `lower`, big_vision's setting. Source: Masry et al. 2022, ChartQA; after Methani et al. 2020.
    """
    right, given = _number(answer), _number(prediction)
    if right and given is not None:
        return abs(given - right) <= TOLERANCE * abs(right)
    return is_exact(prediction, [answer], lower=lower)


@dataclasses.dataclass(eq=False)
class RelaxedAccuracy(Metric):
    """`relaxed_acc` in 0..1: fraction of `is_relaxed_match`; and `acc`, of equal strings.

    A prediction and a reference are a string each. ChartQA's published number is the mean over the
    splits: `RelaxedAccuracy(averages={"mean": ("human", "augmented")})`.
    """

    lower: bool = True
    main = "relaxed_acc"
    expected = "a prediction (string) and its answer (string)"

    def _keep(self, prediction: Any, reference: Any) -> dict[str, float]:
        text, answer = check_text(prediction, "prediction"), check_text(reference, "answer")
        relaxed = is_relaxed_match(text, answer, lower=self.lower)
        equal = is_exact(text, [answer], lower=self.lower)
        return {"relaxed_acc": float(relaxed), "acc": float(equal)}


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


# The official treatment of VQAv2's answers: the evaluation code of VQA (Antol et al. 2015; Goyal et
# al. 2017), as described at visualqa.org/evaluation.html. Its slips are part of the definition and
# kept: a comma between two digits anywhere makes all punctuation vanish, and any point not before a
# digit is dropped.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_POINT = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_DIGITS = "zero one two three four five six seven eight nine ten".split()

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
_WORDS = (
    _without_one_apostrophe()
    | {"somebody'd": "somebodyd", "none": "0"}
    | {word: str(number) for number, word in enumerate(_DIGITS)}
)


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
    return " ".join(_WORDS.get(word, word) for word in out.lower().split() if word not in _ARTICLES)


def vqa_v2_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """In 0..1: the mean, over leaving out each answer, of min(1, matches among the others / 3).

    Both sides have white space stripped; unless all answers are then the same, both go through
    `process_answer`. Sources: Antol et al. 2015 and Goyal et al. 2017 (VQA, VQAv2), and big_vision,
    which treats VQAv2 and TextVQA so.
    """
    prediction, answers = _strip_space(prediction), [_strip_space(a) for a in answers]
    if len(set(answers)) > 1:
        prediction, answers = process_answer(prediction), [process_answer(a) for a in answers]
    matches = sum(answer == prediction for answer in answers)
    misses = len(answers) - matches
    if not matches:
        return 0.0
    # Leaving out one of the matching answers leaves matches - 1, leaving out another all.
    return (matches * min(1, (matches - 1) / 3) + misses * min(1, matches / 3)) / len(answers)


def _strip_space(text: str) -> str:
    """Line breaks and tabs become spaces, and white space around the answer goes."""
    return text.replace("\n", " ").replace("\t", " ").strip()


ANNOTATORS = 10  # answers to each question of VQAv2, TextVQA and VizWiz


@dataclasses.dataclass(eq=False)
class VQAv2Accuracy(Metric):
    """`acc` in 0..1: mean of `vqa_v2_accuracy`. For VQAv2, TextVQA, and VizWiz's official number.

    A prediction is a string, a reference a list of exactly ten strings.
    """

    main = "acc"
    expected = f"a prediction (string) and {ANNOTATORS} answers (a list of strings)"

    def _keep(self, prediction: Any, reference: Any) -> dict[str, float]:
        text = check_text(prediction, "prediction")
        return {"acc": vqa_v2_accuracy(text, check_texts(reference, "answer", ANNOTATORS))}


def simple_vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """In 0..1: min(1, matches / 3), to the letter.

    big_vision's rule for OKVQA, A-OKVQA (direct answer) and VizWiz: nothing is processed and no
    answer left out, so the number is not that of the official evaluation of those.
    """
    return min(1.0, sum(answer == prediction for answer in answers) / 3)


@dataclasses.dataclass(eq=False)
class SimpleVQAAccuracy(Metric):
    """`acc`, `acc_any` and `anls`, all in 0..1: means of big_vision's three scores.

    They are `simple_vqa_accuracy`, whether any answer matches, and the best `anls_score` without
    stripping. A prediction is a string, a reference a list of at least one. For OKVQA (Marino et
    al. 2019), A-OKVQA (Schwenk et al. 2022), VizWiz (Gurari et al. 2018).
    """

    main = "acc"
    expected = "a prediction (string) and at least one answer (a list of strings)"

    def _keep(self, prediction: Any, reference: Any) -> dict[str, float]:
        text, answers = check_text(prediction, "prediction"), check_texts(reference, "answer")
        return {
            "acc": simple_vqa_accuracy(text, answers),
            "acc_any": float(text in answers),
            "anls": anls_score(text, answers, process=False),
        }


@dataclasses.dataclass(eq=False)
class Perplexity(Metric):
    """Negative log-likelihood of the right answers, in nats.

    An example is a pair: its log-probability, summed over its tokens (at most 0), as the
    "prediction", and how many tokens those are (at least 1), as the "reference". `nll`: mean per
    example; `nll_per_token`: mean over examples of each one's mean per token, which big_vision
    calls `avg` of its perplexity; `nll_of_all_tokens`: all nats by all tokens; `perplexity`: exp of
    that, from 1 up (Jelinek et al. 1977).
    """

    main = "nll_per_token"
    expected = "a log-probability in nats (at most 0) and a number of tokens (at least 1)"

    def _keep(self, prediction: Any, reference: Any) -> dict[str, float]:
        tokens = check_number(reference, "number of tokens", low=1)
        # The other way round, so that one check is enough: at most 0, finite.
        number = isinstance(prediction, float | int | np.floating | np.integer)
        nll = check_number(-prediction if number else prediction, "negative log-probability", low=0)
        return {"nll": nll, "tokens": tokens, "nll_per_token": nll / tokens}

    def _summarize(self, sums: Values, means: Values) -> Values:
        pooled = divide(sums["nll"], sums["tokens"])
        return {
            "nll": means["nll"],
            "nll_per_token": means["nll_per_token"],
            "nll_of_all_tokens": pooled,
            "perplexity": np.exp(np.minimum(pooled, 700)),  # beyond, there is no such float
        }

    def _example_scores(self, kept: Sequence[Any]) -> np.ndarray:
        return -super()._example_scores(kept)
