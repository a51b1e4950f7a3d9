"""Answers and labels that a user asks to compare -> tokens, or what is wrong with them."""

from collections.abc import Sequence

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.processing.processor import Processor


def candidate_tokens(
    processor: Processor, candidates: Sequence[str], prompt_length: int
) -> list[list[int]]:
    """Tokens of each candidate answer, EOS included; an empty text is EOS alone.

    `prompt_length` is in tokens; prompt and answer together must fit into `max_text_length`. Raises
    InvalidPromptError for an empty list, for what is no text, and for what does not fit.
    """
    if not isinstance(candidates, list | tuple) or not candidates:
        raise InvalidPromptError(
            f"The candidates are {_describe(candidates)}. A list of at least one answer fits. "
            "Call for example score(image, prompt, ['yes', 'no'])"
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
                f"Candidate {number} has {size} behind a prompt of {prompt_length}. Together at "
                f"most {limit:,} tokens fit. Shorten it, or raise the limit: "
                "dataclasses.replace(processor, max_text_length=...)"
            )
    return answers


def check_labels(labels: Sequence[str]) -> None:
    """Raises InvalidPromptError for an empty list, an empty label or one that comes twice."""
    if not isinstance(labels, list | tuple) or not labels:
        raise InvalidPromptError(
            f"The labels are {_describe(labels)}. A list of different labels fits. "
            "Call for example classify(image, ['cat', 'dog'])"
        )
    seen: dict[str, int] = {}
    for number, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise InvalidPromptError(
                f"Label {number} is {label!r}. Words fit. "
                "To score an empty answer use score(image, prompt, ['', 'cat'])"
            )
        first = seen.setdefault(label, number)
        if first != number:
            raise InvalidPromptError(
                f"The label {label!r} comes twice, as number {first} and {number}, and would share "
                "its probability with itself. Different labels fit. Use list(dict.fromkeys(labels))"
            )


def _describe(value: object) -> str:
    """Something else than a list of texts, in few words."""
    if isinstance(value, list | tuple):
        return "an empty list"
    return repr(value) if isinstance(value, str) else f"of type {type(value).__name__}"
