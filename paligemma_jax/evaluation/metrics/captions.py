"""What the measures of captions have in common: a caption and several references, as words."""

from collections.abc import Callable, Sequence
from typing import Any

from paligemma_jax.evaluation.metrics.misfit import check_text, check_texts
from paligemma_jax.evaluation.metrics.ptb_tokenizer import tokenize

Words = tuple[str, ...]
Tokenizer = Callable[[str], Sequence[str]]

FITS = "A caption (string) and at least one reference (a list of strings) fit."
DEFAULT_TOKENIZER: Tokenizer = tokenize


def read_captions(
    prediction: Any, reference: Any, tokenizer: Tokenizer
) -> tuple[Words, list[Words]]:
    """The words of a caption and of its references; raises Misfit."""
    text = check_text(prediction, "caption")
    references = check_texts(reference, "reference")
    return tuple(tokenizer(text)), [tuple(tokenizer(one)) for one in references]
