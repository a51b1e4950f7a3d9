"""Words of a caption as the Penn Treebank splits them, without Java.

Caption scores are defined on the output of Stanford's PTBTokenizer 3.4.1, lower case, less
punctuation (Chen et al. 2015, Microsoft COCO Captions). This follows it in what stands in captions:
contractions (ca n't, dog 's, gon na), abbreviations that keep their point (st., u.s., a.m.),
numbers, fractions, times and sums of money, hyphens, slashes, brackets (-lrb-, which stay: the list
of punctuation has them in capitals), quotes, dashes, smileys, addresses, letters of any script.

It differs in what is rare there, so that a score may differ in the last digits: a point that ends
both an abbreviation and a sentence, phone numbers, words glued to numbers by a point or a colon,
and mark-up. Like the Java tokenizer it leaves text without spaces (Chinese, Japanese, Thai) in one
piece, so that caption scores of such languages compare whole phrases.
"""

import re

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
    """Lower-case words of a caption, without punctuation."""
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
