"""Prompt templates, as pretraining wrote them (arXiv 2407.07726, section 3.2.5), and their inputs.

Also the labels and candidate answers that users give, and counts in answers.
"""

import re
from collections.abc import Sequence

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.processing.processor import Processor

Labels = str | Sequence[str]  # a list, or "cat ; dog"
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")


def caption(language: str = "en") -> str:
    """`caption en`: a short caption; `language` is a code such as en, de or zh."""
    return f"caption {_language(language)}"


def answer(question: str, language: str = "en") -> str:
    """`answer en what color is the car?`: a short answer in `language`."""
    return f"answer {_language(language)} {_text(question, 'question')}"


def ocr() -> str:
    """`ocr`: the text in the image, in reading order."""
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
        raise InvalidPromptError("Expected at least one label, got an empty list.")
    for name in names:
        if ";" in name or "\n" in name:
            raise InvalidPromptError(
                f"Expected a label without semicolon or line break, got {name!r}. Pass several "
                "labels as a list: detect(['cat', 'dog'])"
            )
    return tuple(names)


def spread_labels(labels: Labels | Sequence[Sequence[str]], images: int) -> list[tuple[str, ...]]:
    """The labels of each image: the same for all, or one list each.

    Raises InvalidPromptError for another number of lists, else as `split_labels`.
    """
    if isinstance(labels, str) or all(isinstance(label, str) for label in labels):
        return [split_labels(labels)] * images  # pyright: ignore[reportArgumentType]
    if len(labels) != images:
        raise InvalidPromptError(
            f"Expected labels for all, or a list of labels for each, of {images} images, got "
            f"{len(labels)} lists."
        )
    return [split_labels(own) for own in labels]


def _language(language: str) -> str:
    if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
        raise InvalidPromptError(
            f"Expected a language code such as 'en', 'de' or 'zh', got {language!r}."
        )
    return language


def _text(text: str, what: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise InvalidPromptError(f"Expected words as the {what}, got {text!r}.")
    return text.strip()


def candidate_tokens(
    processor: Processor, candidates: Sequence[str], prompt_length: int
) -> list[list[int]]:
    """Tokens of each candidate answer, EOS included; an empty text is EOS alone.

    `prompt_length` is in tokens; prompt and answer together must fit into `max_text_length`. Raises
    InvalidPromptError for an empty list, for what is no text, and for what is too long.
    """
    if not isinstance(candidates, list | tuple) or not candidates:
        raise InvalidPromptError(
            f"Expected a list of at least one answer, got {_describe(candidates)}. Call "
            "score(image, prompt, ['yes', 'no'])"
        )
    tokenizer, limit = processor.tokenizer, processor.max_text_length
    answers = []
    for number, text in enumerate(candidates):
        size = None
        if isinstance(text, str) and len(text) > limit * tokenizer.longest_piece:
            size = f"{len(text):,} characters"  # cannot fit, and is not even tokenized
        else:
            tokens = [*tokenizer.encode(text), tokenizer.eos_id]
            if prompt_length + len(tokens) > limit:
                size = f"{len(tokens):,} tokens, eos included,"
            answers.append(tokens)
        if size is not None:
            raise InvalidPromptError(
                f"Candidate {number} has {size} after a prompt of {prompt_length}. Expected at "
                f"most {limit:,} tokens together. Shorten it, or raise the limit: "
                "dataclasses.replace(processor, max_text_length=...)"
            )
    return answers


def check_labels(labels: Sequence[str]) -> None:
    """Raises InvalidPromptError for an empty list, an empty label or one that comes twice."""
    if not isinstance(labels, list | tuple) or not labels:
        raise InvalidPromptError(
            f"Expected a list of different labels, got {_describe(labels)}. Call "
            "classify(image, ['cat', 'dog'])"
        )
    known: dict[str, int] = {}
    for number, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise InvalidPromptError(
                f"Expected words as label {number}, got {label!r}. To score an empty answer use "
                "score(image, prompt, ['', 'cat'])"
            )
        first = known.setdefault(label, number)
        if first != number:
            raise InvalidPromptError(
                f"Expected different labels, got {label!r} twice, as number {first} and {number}. "
                "Use list(dict.fromkeys(labels))"
            )


def _describe(value: object) -> str:
    """Something else than a list of texts, in few words."""
    if isinstance(value, list | tuple):
        return "an empty list"
    return repr(value) if isinstance(value, str) else f"of type {type(value).__name__}"


_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def parse_number(text: str) -> int | None:
    """The number that an answer is, in digits or as an English word; None for anything else."""
    word = text.strip().lower().rstrip(".")
    if word in _WORDS:
        return _WORDS.index(word)
    return int(word) if re.fullmatch(r"[0-9]{1,18}", word) else None
