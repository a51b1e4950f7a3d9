"""The same question for objects about many pictures, held to its grammar."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from PIL import Image

from paligemma_jax.answering.prompted_model import PromptedModel
from paligemma_jax.errors import InvalidImageError
from paligemma_jax.generation.encoded import EncodedImages
from paligemma_jax.generation.grammar import ObjectGrammar
from paligemma_jax.generation.observer import BoxEvidence
from paligemma_jax.processing import prompts
from paligemma_jax.processing.confidence import WeighedAnswer, weigh_tokens
from paligemma_jax.processing.image_source import ImageSource, load_image
from paligemma_jax.processing.prompts import Labels
from paligemma_jax.processing.tokenizer import Tokenizer

_Found = TypeVar("_Found")
OnePicture = ImageSource | EncodedImages


def find_objects(
    asked: PromptedModel,
    images: Sequence[OnePicture],
    labels: Labels | Sequence[Sequence[str]],
    prompt_of: Callable[[Labels], str],
    grammar_of: Callable[[Tokenizer, Labels], ObjectGrammar],
    read: Callable[[WeighedAnswer, int, int], _Found],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[_Found]:
    """What `read` makes of each answer and of the width and height of its picture.

    Raises InvalidImageError, InvalidPromptError.
    """
    tokenizer = asked.processor.tokenizer
    every_row = prompts.spread_labels(labels, len(images))
    grammars = {row: grammar_of(tokenizer, row) for row in set(every_row)}
    found = []
    for start in range(0, len(images), batch_size):
        pictures = [_one_picture(image) for image in images[start : start + batch_size]]
        rows = every_row[start : start + batch_size]
        same = len(set(rows)) == 1
        answers = asked.generate(
            pictures,
            [prompt_of(row) for row in rows],
            max_new_tokens=max_new_tokens,
            constraint=grammars[rows[0]] if same else [grammars[row] for row in rows],
            observer=BoxEvidence(tokenizer.loc_start),
            batch_size=batch_size,
        )
        for picture, answer in zip(pictures, answers, strict=True):
            weighed = weigh_tokens(answer.tokens, answer.logprobs, tokenizer, answer.evidence)
            size = picture.sizes[0] if isinstance(picture, EncodedImages) else picture.size
            found.append(read(weighed, *size))
    return found


def _one_picture(image: OnePicture) -> Image.Image | EncodedImages:
    """With its size; InvalidImageError for several pictures, of which boxes would say nothing."""
    if not isinstance(image, EncodedImages):
        return load_image(image)
    if len(image) != 1:
        raise InvalidImageError(
            f"Boxes are of one picture, and {len(image)} were encoded together. One fits. "
            "Encode each by itself: pali.encode(image)"
        )
    return image
