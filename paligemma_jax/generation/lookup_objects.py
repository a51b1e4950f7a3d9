"""What makes good guesses of answers to `detect` and `segment`; see `generate_by_lookup`."""

from collections.abc import Sequence

from paligemma_jax.generation.label_paths import CODES, CORNERS, label_paths
from paligemma_jax.processing.tokenizer import LOC_PIECES, SEG_PIECES, Tokenizer


def object_kinds(tokenizer: Tokenizer) -> tuple[tuple[int, int], ...]:
    """`kinds`: all locations are alike, and all mask codes."""
    return (
        (tokenizer.loc_start, tokenizer.loc_start + len(LOC_PIECES)),
        (tokenizer.seg_start, tokenizer.seg_start + len(SEG_PIECES)),
    )


def object_reference(
    tokenizer: Tokenizer, labels: str | Sequence[str], *, masks: bool = False
) -> list[int]:
    """A reference for one row: an object of each label asked for, at no place in particular.

    With it the first label is guessed too, behind the first box (with `masks`, its codes).
    Raises InvalidPromptError for labels that cannot be answered with.
    """
    box = [tokenizer.loc_start] * CORNERS + [tokenizer.seg_start] * CODES * masks
    paths = label_paths(tokenizer, labels, masks)
    return [token for label in paths for token in (*box, *label.again)]
