"""The official treatment of answers of VQAv2 before they are compared.

Source: the evaluation code of VQA (Antol et al. 2015; Goyal et al. 2017), as described at
visualqa.org/evaluation.html. Its slips are part of the definition and kept: a comma between two
digits anywhere makes all punctuation vanish, and any point not before a digit is dropped.
"""

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_POINT = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten".split()

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
    | {word: str(number) for number, word in enumerate(_NUMBERS)}
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
    return " ".join(_WORDS.get(word, word) for word in out.lower().split() if word not in _ARTICLES)
