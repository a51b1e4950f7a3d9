"""PaliGemma's prompt language, as its pretraining wrote it (arXiv 2407.07726, section 3.2.5)."""

import re
from collections.abc import Sequence

from paligemma_jax.errors import InvalidPromptError

Labels = str | Sequence[str]  # a list, or "cat ; dog"
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")


def caption(language: str = "en") -> str:
    """`caption en`: a short caption; `language` is a code such as en, de or zh."""
    return f"caption {_language(language)}"


def answer(question: str, language: str = "en") -> str:
    """`answer en what colour is the car?`: a short answer in `language`."""
    return f"answer {_language(language)} {_text(question, 'question')}"


def ocr() -> str:
    """`ocr`: the text in the picture, in reading order."""
    return "ocr"


def count(thing: str) -> str:
    """`answer en how many cats are there?`; `thing` in the plural, as it is to be asked for."""
    return answer(f"how many {_text(thing, 'thing to count')} are there?")


def detect(labels: Labels) -> str:
    """`detect cat ; dog`: boxes of one kind of thing, or of several (a list, or "cat ; dog")."""
    return "detect " + " ; ".join(split_labels(labels))


def segment(labels: Labels) -> str:
    """`segment cat ; dog`: boxes and mask tokens; labels as `detect` takes them."""
    return "segment " + " ; ".join(split_labels(labels))


def split_labels(labels: Labels) -> tuple[str, ...]:
    """Labels one by one; InvalidPromptError for none, an empty one, or one with a separator."""
    several = labels.split(";") if isinstance(labels, str) else labels
    names = [_text(name, "label") for name in several]
    if not names:
        raise InvalidPromptError(
            "The list of labels is empty. At least one label fits. Call for example detect('cat')"
        )
    for name in names:
        if ";" in name or "\n" in name:
            raise InvalidPromptError(
                f"The label {name!r} holds a semicolon or a line break, which separate labels. "
                "Plain words fit. Pass several labels as a list: detect(['cat', 'dog'])"
            )
    return tuple(names)


def spread_labels(labels: Labels | Sequence[Sequence[str]], pictures: int) -> list[tuple[str, ...]]:
    """The labels of each picture: the same for all, or one list each.

    Raises InvalidPromptError for another number of lists, else as `split_labels`.
    """
    if isinstance(labels, str) or all(isinstance(label, str) for label in labels):
        return [split_labels(labels)] * pictures  # pyright: ignore[reportArgumentType]
    if len(labels) != pictures:
        raise InvalidPromptError(
            f"{len(labels)} lists of labels do not go with {pictures} pictures. One list for each "
            "picture, or one for all of them, fits. Call for example detect_batch(images, ['cat'])"
        )
    return [split_labels(row) for row in labels]


def _language(language: str) -> str:
    if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
        raise InvalidPromptError(
            f"{language!r} is no language code. A short code such as 'en', 'de' or 'zh' fits. "
            "Pass it as language='en'."
        )
    return language


def _text(text: str, what: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise InvalidPromptError(
            f"The {what} is {text!r}. Words fit. For a description of the picture use caption()."
        )
    return text.strip()
