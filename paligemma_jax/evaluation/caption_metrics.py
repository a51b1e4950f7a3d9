"""Metrics of captions: CIDEr-D, BLEU, METEOR (as far as it goes without word lists) and ROUGE-L,
on the words of the Penn Treebank tokenizer, with Porter's second English stemmer.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_jax.evaluation.metric import (
    Measure,
    Metric,
    Values,
    check_text,
    check_texts,
    divide,
)
from paligemma_jax.evaluation.text_metrics import longest_common_subsequence

# What the evaluation drops. "-LRB-" and its like are on the list, but come in lower case.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}

_ABBREVIATIONS = """
ala ariz calif colo conn fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt
wis wisc wyo adj adm assn assoc asst atty ave blvd bldg brig bros capt cie cmdr co col comdr corp
cpl dept det dr drs est esq etc ext ft gen gov hon inc insp intl jr lt ltd maj messrs mfg mlle mme
mr mrs ms msgr mt natl pfc prof pres pvt rd rep reps rev rt sen sens sep sept sgt sq sr st ste supt
tel univ vs jan feb mar apr jun jul aug oct nov dec mon tue tues wed thu thurs fri ct cf al wm alex
""".split()
_BEFORE_NUMBERS = "fig figs no nos op pp prop ca".split()  # "no. 5", but "no ."

_SPELLINGS = {
    **dict.fromkeys("\u2018\u2019\u201b\u2032", "'"),
    **dict.fromkeys("\u201c\u201d\u00ab\u00bb", '"'),
    **dict.fromkeys("\u2012\u2013\u2014\u2015", " -- "),
    "\u2026": "...",
    "\u00a2": " cents ",
    "\u00a3": " # ",
    "\u20ac": " $ ",
    "\u00bd": " 1/2 ",
    "\u00bc": " 1/4 ",
    "\u00be": " 3/4 ",
    "&amp;": "&",
    "&quot;": '"',
    "&lt;": "<",
    "&gt;": ">",
}
_SPELLING = re.compile("|".join(map(re.escape, _SPELLINGS)))
_CAPITALS_AND = re.compile("(?<=[A-Z])&(?=[A-Z])")  # AT&T is one word, a&b are three
_AND = "\ue000"  # stands for it, as a letter
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

# A letter or digit of any script: neither white space nor a mark. Accents may stand alone.
_MARKS = r"!-/:-@\[-`{-~\u00a0-\u00bf\u00d7\u00f7\u2010-\u205e\u20a0-\u2bff"
_WIDE_MARKS = r"\u3000-\u3020\uff01-\uff0f\uff1a-\uff20"
_L = rf"[^\s{_MARKS}{_WIDE_MARKS}]"
_ENDING = rf"(?:'n'|(?:'(?:s|m|d|re|ve|ll|n)|n't)(?!{_L}))"
# One letter after another as long as no contraction begins; o'clock and d'you are one word.
_PART = rf"(?:(?!{_ENDING}){_L})+"
_TOKEN = re.compile(
    "|".join(
        [
            r"https?://[^\s<>\"]+[^\s<>\".,;:!?)'\]]",
            r"[\w.+-]+@\w[\w-]*(?:\.\w+)+",
            r"</?[a-z][^<>]*>",
            r"(?<!\S)[@#][a-z_]\w*",
            rf"[:;=]-?(?:[()]|d(?!{_L}))",
            # Single words that are two: the second is found next.
            rf"can(?=not(?!{_L}))|(?:gon|wan)(?=na(?!{_L}))|got(?=ta(?!{_L}))"
            rf"|(?:gim|lem)(?=me(?!{_L}))|'t(?=(?:is|was)(?!{_L}))|y'(?=all(?!{_L}))",
            _ENDING,
            rf"'em(?!{_L})|'cause(?!{_L})|(?<!\d)'\d\ds?(?!{_L})",
            rf"(?:{'|'.join(_ABBREVIATIONS)})\.(?!{_L})",
            rf"(?:{'|'.join(_BEFORE_NUMBERS)})\.(?=\s*\d)",
            rf"[^\W\d_](?:\.[^\W\d_])*\.(?!{_L})|ph\.d\.(?!{_L})",
            r"[-+](?=\.?\d)(?<![^\s(].)\.?\d+(?:[.,:/]\d+)*",
            r"\d+:\d+(?=[ap]m\b)",
            rf"\d+(?:[.,:/]\d+)*(?:{_PART})?(?:[-/_]{_PART})*|\.\d+",
            rf"{_PART}(?:(?!{_ENDING})[-/_.']{_PART})*[$]?",
            r"\.{2,}|-{2,}|[!?]+|``|''|.",
        ]
    )
)


def tokenize(caption: str) -> list[str]:
    """Lower-case words of a caption, without punctuation, as the Penn Treebank splits them.

    Caption scores are defined on the output of Stanford's PTBTokenizer 3.4.1, lower case, less
    punctuation (Chen et al. 2015, Microsoft COCO Captions). This follows it in what stands in
    captions: contractions (ca n't, dog 's, gon na), abbreviations that keep their point (st., u.s.,
    a.m.), numbers, fractions, times and sums of money, hyphens, slashes, brackets (-lrb-, which
    stay: the list of punctuation has them in capitals), quotes, dashes, smileys, addresses, letters
    of any script. It differs in what is rare there, so that a score may differ in the last digits:
    a point that ends both an abbreviation and a sentence, phone numbers, words glued to numbers by
    a point or a colon, and mark-up. Like the Java tokenizer it leaves text without spaces (Chinese,
    Japanese, Thai) in one piece, so caption scores of such languages compare whole phrases.
    """
    text = _CAPITALS_AND.sub(_AND, caption).lower()
    text = _SPELLING.sub(lambda found: _SPELLINGS[found[0]], text)
    tokens = (found[0] for found in _TOKEN.finditer(text))
    return [_written(token) for token in tokens if not token.isspace() and not _is_mark(token)]


def _is_mark(token: str) -> bool:
    return token in _DROPPED or token == '"' or (len(token) > 1 and not token.strip(".-"))


def _written(token: str) -> str:
    if len(token) < 4 and any(bracket in token for bracket in "()[]{}"):
        return "".join(_BRACKETS.get(letter, letter) for letter in token)
    return token.replace(_AND, "&")


Words = tuple[str, ...]
Caption = tuple[Words, list[Words]]  # of a caption and of its references
Ngram = tuple[str, ...]
LONGEST = 4  # n-grams of CIDEr and BLEU


def count_ngrams(words: Words) -> Counter[Ngram]:
    """How often each run of 1 to 4 words comes."""
    return Counter(
        words[start : start + length]
        for length in range(1, LONGEST + 1)
        for start in range(len(words) - length + 1)
    )


@dataclasses.dataclass(eq=False)
class CaptionMetric(Metric):
    """A metric of a caption (string) and its references (a list of at least one).

    `tokenizer` gives the words of a caption; see `tokenize` for how the default differs from the
    Java one, and pass `str.split` for captions that are tokenized.
    """

    tokenizer: Callable[[str], Sequence[str]] = tokenize
    expected = "a caption (string) and at least one reference (a list of strings)"

    def _keep(self, prediction: Any, reference: Any) -> Caption:
        text, references = check_text(prediction, "caption"), check_texts(reference, "reference")
        return tuple(self.tokenizer(text)), [tuple(self.tokenizer(one)) for one in references]

    def _numbers(self, words: Words, references: Sequence[Words]) -> dict[str, float]:
        """What the scores are made of, summed over examples."""
        raise NotImplementedError

    def _measure(self, kept: Sequence[Caption]) -> Measure:
        return super()._measure([self._numbers(*one) for one in kept])

    def _example_scores(self, kept: Sequence[Caption]) -> np.ndarray:
        return super()._example_scores([self._numbers(*one) for one in kept])


@dataclasses.dataclass(eq=False)
class CIDEr(CaptionMetric):
    """`cider`, from 0 to 10: mean over images of CIDEr-D. Published tables give it times 100.

    For n = 1 to 4, n-grams of caption and reference are weighed by their count times log(images /
    images with that n-gram in a reference); the similarity is the cosine of the two vectors, with
    the caption's weight cut to the reference's in the product, times exp(-d^2 / 72), d being the
    difference of their lengths. It is averaged over n and over references, times 10. Weights of
    n-grams are those of the references of all examples together, so a part of a data set scores
    differently, and a single image 0.

    A prediction is a string, a reference a list of at least one. Source: Vedantam et al. 2015; as
    in pycocoevalcap. For COCO, NoCaps, TextCaps, SciCap, Screen2Words, Widget Captioning and
    captions of videos; and with `CIDEr(averages={"mean": None}, overall=False)` and the languages
    as groups for XM3600 and COCO-35L.
    """

    def _measure(self, kept: Sequence[Caption]) -> Measure:
        scores = self._example_scores(kept)
        return lambda weights: {"cider": divide(weights @ scores, weights.sum(axis=1))}

    def _example_scores(self, kept: Sequence[Caption]) -> np.ndarray:
        counts = [(count_ngrams(words), list(map(count_ngrams, refs))) for words, refs in kept]
        images: Counter[Ngram] = Counter()
        for _, references in counts:
            images.update(set().union(*references))
        rarity = {ngram: math.log(len(kept)) - math.log(count) for ngram, count in images.items()}

        def vectors(count: Mapping[Ngram, int]) -> list[dict[Ngram, float]]:
            """For each length of n-gram, the weights."""
            parts: list[dict[Ngram, float]] = [{} for _ in range(LONGEST)]
            for ngram, times in count.items():
                parts[len(ngram) - 1][ngram] = times * rarity.get(ngram, math.log(len(kept)))
            return parts

        scores = []
        for caption, references in counts:
            own = vectors(caption)
            values = [
                _similarity(own, vectors(reference), _length(caption) - _length(reference))
                for reference in references
            ]
            scores.append(10 * float(np.mean(values)))
        return np.array(scores)


def _similarity(
    own: Sequence[Mapping[Ngram, float]], other: Sequence[Mapping[Ngram, float]], difference: int
) -> float:
    total = 0.0
    for first, second in zip(own, other, strict=True):
        common = sorted(first.keys() & second.keys())
        product = sum(min(first[g], second[g]) * second[g] for g in common)
        norms = _norm(first) * _norm(second)
        total += product / norms if norms else 0.0
    return math.exp(-(difference**2) / 72) * total / LONGEST


def _length(count: Mapping[Ngram, int]) -> int:
    """In bigrams: one less than in words, as the reference code has it."""
    return sum(times for ngram, times in count.items() if len(ngram) == 2)


def _norm(vector: Mapping[Ngram, float]) -> float:
    return math.sqrt(sum(weight**2 for weight in vector.values()))


_TINY, _SMALL = 1e-15, 1e-9  # as in pycocoevalcap: no logarithm of 0, and no division by it


@dataclasses.dataclass(eq=False)
class BLEU(CaptionMetric):
    """`bleu-1` to `bleu-4`, in 0..1, of all captions together.

    bleu-k is the geometric mean, for n = 1 to k, of the fraction of n-grams of the captions that
    are in a reference (each at most as often as in the reference that has it most often), times
    exp(1 - r / c) where the captions are shorter than the references: c words in all against r,
    of each image those of the reference nearest in length, the shorter of two. A prediction is a
    string, a reference a list of at least one. Source: Papineni et al. 2002; as in pycocoevalcap,
    without smoothing. SciCap is reported in bleu-4.
    """

    main = "bleu-4"

    def _numbers(self, words: Words, references: Sequence[Words]) -> dict[str, float]:
        most: Counter[Ngram] = Counter()
        for one in references:
            most |= count_ngrams(one)
        found = count_ngrams(words) & most
        numbers: dict[str, float] = {
            "caption": len(words),
            "reference": min((abs(len(r) - len(words)), len(r)) for r in references)[1],
        }
        for n in range(1, LONGEST + 1):
            numbers[f"right{n}"] = sum(times for ngram, times in found.items() if len(ngram) == n)
            numbers[f"all{n}"] = max(0, len(words) - n + 1)
        return numbers

    def _summarize(self, sums: Values, means: Values) -> Values:
        ratio = (sums["caption"] + _TINY) / (sums["reference"] + _SMALL)
        brevity = np.where(ratio < 1, np.exp(np.minimum(0, 1 - 1 / ratio)), 1.0)
        values, product = {}, np.ones_like(ratio)
        for n in range(1, LONGEST + 1):
            product = product * (sums[f"right{n}"] + _TINY) / (sums[f"all{n}"] + _SMALL)
            values[f"bleu-{n}"] = product ** (1 / n) * brevity
        return values


@dataclasses.dataclass(eq=False)
class RougeL(CaptionMetric):
    """`rouge-l` in 0..1: mean of an F measure that favors recall (beta 1.2).

    Precision is the longest common subsequence by the words of the caption, recall by those of the
    reference, each the best over the references. A prediction is a string, a reference a list of at
    least one. Source: Lin 2004; as in pycocoevalcap.
    """

    main = "rouge-l"

    def _numbers(self, words: Words, references: Sequence[Words]) -> dict[str, float]:
        common = [longest_common_subsequence(words, one) for one in references]
        precision = max(common) / max(1, len(words))
        recall = max(c / max(1, len(one)) for c, one in zip(common, references, strict=True))
        if not precision or not recall:
            return {"rouge-l": 0.0}
        square = 1.2**2
        return {"rouge-l": (1 + square) * precision * recall / (recall + square * precision)}


_ALPHA, _BETA, _GAMMA = 0.85, 0.2, 0.6
_EXACT, _STEM = 1.0, 0.6
_BEAM = 40


@dataclasses.dataclass(eq=False)
class Meteor(CaptionMetric):
    """`meteor-exact-stem`, in 0..1: METEOR 1.5 of the words and stems alone.

    The words of a caption are matched to those of a reference, equal ones (weight 1) or ones of
    equal English stem (0.6): as many as can be, then in as few chunks of neighbors as can be. With
    P and R the weight of the matches by the words of caption and reference, the score is
    P R / (0.85 P + 0.15 R) times 1 - 0.6 (chunks / matches)^0.2; of several references the best
    counts. Over all captions it is made of the sums, as METEOR 1.5 does.

    This is not the METEOR of published tables, and lower: synonyms come from WordNet, paraphrases
    and the list of function words (which that one weighs less) from tables of the Java program,
    none of which are here. Compare it with itself only. A prediction is a string, a reference a
    list of at least one. Source: Denkowski and Lavie 2014.
    """

    main = "meteor-exact-stem"

    def _numbers(self, words: Words, references: Sequence[Words]) -> dict[str, float]:
        every = []
        for reference in references:
            best = _align(words, reference)
            whole = best.chunks == 1 and best.matches == len(words) == len(reference)
            every.append({
                "matches": float(best.matches),
                "weight": best.weight,
                "chunks": 0.0 if whole else float(best.chunks),
                "words": float(len(words)),
                "reference": float(len(reference)),
            })  # fmt: skip
        scores = Metric._example_scores(self, every)
        return every[int(np.argmax(scores))]

    def _summarize(self, sums: Values, means: Values) -> Values:
        precision = divide(sums["weight"], sums["words"], 0.0)
        recall = divide(sums["weight"], sums["reference"], 0.0)
        mean = divide(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall, 0.0)
        fragmented = divide(sums["chunks"], sums["matches"], 0.0) ** _BETA
        return {"meteor-exact-stem": mean * (1 - _GAMMA * fragmented)}


@dataclasses.dataclass(frozen=True)
class _Alignment:
    """Words matched so far; sorted, the best comes first."""

    matches: int = 0
    weight: float = 0.0
    chunks: int = 0
    distance: int = 0
    used: int = 0  # bit i: word i of the reference
    last: int = -2  # place of the reference that the word before was matched to

    @property
    def rank(self) -> tuple[float, ...]:
        return -self.matches, self.chunks, self.distance, -self.weight


def _align(words: Sequence[str], reference: Sequence[str]) -> _Alignment:
    """The best of a beam, over the words of the caption from left to right."""
    stems = [stem(word) for word in reference]
    beam = [_Alignment()]
    for place, word in enumerate(words):
        fitting = [
            (i, _EXACT if word == other else _STEM)
            for i, other in enumerate(reference)
            if word == other or stem(word) == stems[i]
        ]
        grown = [dataclasses.replace(state, last=-2) for state in beam]
        for state in beam:
            for i, weight in fitting:
                if not state.used >> i & 1:
                    chunks = state.chunks + (state.last + 1 != i)
                    matches, distance = state.matches + 1, state.distance + abs(i - place)
                    used = state.used | 1 << i
                    added = _Alignment(matches, state.weight + weight, chunks, distance, used, i)
                    grown.append(added)
        # Of alignments that can go on alike, the best one is enough.
        best: dict[tuple[int, int], _Alignment] = {}
        for state in sorted(grown, key=lambda one: one.rank):
            best.setdefault((state.used, state.last), state)
        beam = list(best.values())[:_BEAM]
    return min(beam, key=lambda one: one.rank)


_DOUBLES = ("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")
_WHOLE = {
    "skis": "ski", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "idly": "idl",
    "gently": "gentl", "ugly": "ugli", "early": "earli", "only": "onli", "singly": "singl",
    **{word: word for word in ("sky", "news", "howe", "atlas", "cosmos", "bias", "andes")},
}  # fmt: skip
_AFTER_PLURAL = "inning outing canning herring earring proceed exceed succeed".split()
_SECOND = {
    "ization": "ize", "ational": "ate", "fulness": "ful", "ousness": "ous", "iveness": "ive",
    "tional": "tion", "biliti": "ble", "lessli": "less", "entli": "ent", "ation": "ate",
    "alism": "al", "aliti": "al", "ousli": "ous", "iviti": "ive", "fulli": "ful", "enci": "ence",
    "anci": "ance", "abli": "able", "izer": "ize", "ator": "ate", "alli": "al", "bli": "ble",
}  # fmt: skip
_THIRD = {
    "ational": "ate", "tional": "tion", "alize": "al", "icate": "ic", "iciti": "ic", "ical": "ic",
    "ness": "", "ful": "",
}  # fmt: skip
_FOURTH = (
    "ement", "ance", "ence", "able", "ible", "ment", "ant", "ent", "ism", "ate", "iti", "ous",
    "ive", "ize", "al", "er", "ic",
)  # fmt: skip
_REGION = re.compile("[aeiouy][^aeiouy]")
_SHORT_END = re.compile("(?:[^aeiouy][aeiouy][^aeiouywxY]|^[aeiouy][^aeiouy])$")


@functools.lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """The stem of a lower-case word, by snowballstem.org/algorithms/english/stemmer.html."""
    if len(word) <= 2:
        return word
    word = word.removeprefix("'")
    if word in _WHOLE:
        return _WHOLE[word]
    word = re.sub("(^|[aeiouy])y", r"\1Y", word)  # a y that is a consonant
    first, second = _regions(word)
    for ending in ("'s'", "'s", "'"):
        if word.endswith(ending):
            word = word[: -len(ending)]
            break
    word = _plural(word)
    if word in _AFTER_PLURAL:
        return word
    word = _past(word, first)
    if len(word) > 2 and word[-1] in "yY" and word[-2] not in "aeiouy":
        word = word[:-1] + "i"
    word = _derived(word, first, second)
    word = _last(word, first, second)
    return word.replace("Y", "y")


def _regions(word: str) -> tuple[int, int]:
    """Where the part after the first vowel and consonant begins, and that after the next pair."""
    special = re.match("gener|commun|arsen", word)
    found = special or _REGION.search(word)
    first = found.end() if found else len(word)
    found = _REGION.search(word, first)
    return first, found.end() if found else len(word)


def _plural(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith(("ied", "ies")):
        return word[:-2] if len(word) > 4 else word[:-1]
    if word.endswith("s") and not word.endswith(("us", "ss")) and re.search("[aeiouy]", word[:-2]):
        return word[:-1]
    return word


def _past(word: str, first: int) -> str:
    for ending in ("eedly", "eed"):
        if word.endswith(ending):
            return word[: -len(ending)] + "ee" if len(word) - len(ending) >= first else word
    for ending in ("ingly", "edly", "ing", "ed"):
        if word.endswith(ending):
            rest = word[: -len(ending)]
            if not re.search("[aeiouy]", rest):
                return word
            if rest.endswith(("at", "bl", "iz")):
                return rest + "e"
            if rest.endswith(_DOUBLES):
                return rest[:-1]
            return rest + "e" if len(rest) <= first and _SHORT_END.search(rest) else rest
    return word


def _derived(word: str, first: int, second: int) -> str:
    for ending, new in _SECOND.items():
        if word.endswith(ending):
            word = word[: -len(ending)] + new if len(word) - len(ending) >= first else word
            break
    else:
        if word.endswith("ogi") and word[-4:-3] == "l" and len(word) - 3 >= first:
            word = word[:-1]
        elif word.endswith("li") and word[-3:-2] in set("cdeghkmnrt") and len(word) - 2 >= first:
            word = word[:-2]
    for ending, new in _THIRD.items():
        if word.endswith(ending):
            return word[: -len(ending)] + new if len(word) - len(ending) >= first else word
    if word.endswith("ative") and len(word) - 5 >= max(first, second):
        return word[:-5]
    return word


def _last(word: str, first: int, second: int) -> str:
    for ending in _FOURTH:
        if word.endswith(ending):
            word = word[: -len(ending)] if len(word) - len(ending) >= second else word
            break
    else:
        if word.endswith(("sion", "tion")) and len(word) - 3 >= second:
            word = word[:-3]
    end = len(word) - 1
    if word.endswith("e") and (
        end >= second or (end >= first and not _SHORT_END.search(word[:-1]))
    ):
        return word[:-1]
    return word[:-1] if word.endswith("ll") and end >= second else word


@dataclasses.dataclass(eq=False)
class CaptionScores(CaptionMetric):
    """CIDEr, BLEU, ROUGE-L and METEOR (exact and stem) of the same captions, as each defines it.

    CIDEr says how good each caption is.
    """

    @property
    def definition(self) -> str:
        """The rules of all four, in words."""
        return "\n\n".join(part.definition for part in _PARTS)

    def _measure(self, kept: Sequence[Caption]) -> Measure:
        measures = [part._measure(kept) for part in _PARTS]
        return lambda weights: {k: v for one in measures for k, v in one(weights).items()}

    def _example_scores(self, kept: Sequence[Caption]) -> np.ndarray:
        return CIDEr()._example_scores(kept)


_PARTS = (CIDEr(), BLEU(), RougeL(), Meteor())
