"""Stems of English words.

Source: Porter's second English stemmer, snowballstem.org/algorithms/english/stemmer.html.
"""

import functools
import re

_DOUBLES = ("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")
_WHOLE = {
    "skis": "ski", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "idly": "idl",
    "gently": "gentl", "ugly": "ugli", "early": "earli", "only": "onli", "singly": "singl",
    **{word: word for word in ("sky", "news", "howe", "atlas", "cosmos", "bias", "andes")},
}  # fmt: skip
_AFTER_PLURAL = {
    "inning",
    "outing",
    "canning",
    "herring",
    "earring",
    "proceed",
    "exceed",
    "succeed",
}
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
    """The stem of a lower-case word."""
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
