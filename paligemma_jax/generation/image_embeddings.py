"""Pictures through the image encoder once, for any number of prompts.

What is kept is what the encoder gives: one vector a patch, before the decoder. The decoder's keys
and values of these image tokens cannot be kept for the next prompt. PaliGemma is a prefix-LM: image
tokens see the prompt as the prompt sees them. The first layer's keys and values still depend on the
picture alone, but what that layer passes on has looked at the prompt, so from the second layer on
they are different for every prompt. (A model that is causal over the whole sequence could keep
them.) All answers to one prompt do share them: answers are causal, and the prefix never sees them.

Letters: B prompts, N pictures a prompt, P patches a picture, W decoder width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError, InvalidImageError, InvalidPromptError
from paligemma_jax.generation.devices import by_rows
from paligemma_jax.models.layers import Jitted
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.image import ImagePreprocessing, load_image
from paligemma_jax.processing.processor import (
    Batch,
    Processor,
    bucket,
    group_by_image_count,
    pictures_of,
)

PICTURES_AT_ONCE = 8  # through the encoder; bounds memory when a video has many frames


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedImages:
    """The pictures of one prompt, encoded: given in place of them, they are not encoded again.

    Attributes:
      tokens: f[N * P, W] on the device, in the model's dtype, picture after picture.
      sizes: width and height in pixels of each picture, for boxes in pixels.
      config: of the model that encoded them; another model's embeddings mean something else.
    """

    tokens: jax.Array
    sizes: tuple[tuple[int, int], ...]
    config: PaliGemmaConfig

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.sizes)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.tokens.shape))
        return f"EncodedImages({len(self)} pictures, tokens {self.tokens.dtype}[{shape}])"


def encode(
    model: PaliGemma,
    preprocessing: ImagePreprocessing,
    images: Any,
    *,
    allow_urls: bool = False,
) -> EncodedImages:
    """Encodes a picture, or the several pictures (or video frames) of one prompt, in their order.

    The same object given several times is read and encoded once. Raises InvalidImageError.
    """
    if isinstance(images, EncodedImages):
        _check_fits(images, model)
        return images
    pictures = pictures_of(images)
    if not pictures:
        raise InvalidImageError(
            "There is no picture to encode. A picture, or a list of at least one, fits. "
            "Call for example pali.encode('cat.jpg')"
        )
    distinct = {id(picture): picture for picture in pictures}  # by identity, as in Processor
    sizes, pixels = [], []
    for picture in distinct.values():
        loaded = load_image(picture, allow_urls=allow_urls)
        sizes.append(loaded.size)
        pixels.append(preprocessing.preprocess(loaded))
    tokens = _in_groups(model, np.stack(pixels))
    places = {key: place for place, key in enumerate(distinct)}
    order = [places[id(picture)] for picture in pictures]
    if order != list(range(len(distinct))):
        tokens = tokens[np.array(order)]
    return EncodedImages(
        tokens=tokens.reshape(-1, tokens.shape[-1]),
        sizes=tuple(sizes[place] for place in order),
        config=model.config,
    )


def group_by_picture_count(
    images: Sequence[Any],
) -> dict[int, list[int]]:
    """As `group_by_image_count`, for entries of which some are encoded."""
    return group_by_image_count([e.sizes if isinstance(e, EncodedImages) else e for e in images])


def prepare(
    model: PaliGemma,
    processor: Processor,
    images: Sequence[Any],
    prompts: Sequence[str],
    *,
    answers: Sequence[str] | None = None,
    allow_urls: bool = False,
) -> tuple[Batch, jax.Array | None]:
    """A batch, and its image tokens where pictures are encoded or come several times.

    An entry that several prompts share is encoded once, whether or not it comes as EncodedImages.
    With image tokens f[B, N * P, W] the batch has no pictures; without (None) it has them, and
    they can be encoded in one program with the prompt. `answers` are beginnings to go on from.
    Raises as `Processor` and `encode` do.
    """
    keys = [_identity(entry) for entry in images]
    encoded_already = any(isinstance(entry, EncodedImages) for entry in images)
    shared = len(set(keys)) < len(keys) and any(keys)
    if len(images) != len(prompts) or not (encoded_already or shared):
        return processor(images, prompts, answers=answers, allow_urls=allow_urls), None
    groups = group_by_picture_count(images)
    if len(groups) > 1:
        raise InvalidPromptError(
            f"The prompts of this batch have {' and '.join(map(str, groups))} pictures. Equally "
            "many for each prompt fit. Make one batch of each: group_by_picture_count(images)"
        )
    batch = processor(None, prompts, answers=answers)
    encoded: dict[tuple[int, ...], EncodedImages] = {}
    for number, (key, entry) in enumerate(zip(keys, images, strict=True)):
        if key not in encoded:
            try:
                encoded[key] = encode(model, processor.image, entry, allow_urls=allow_urls)
            except InvalidImageError as e:
                raise InvalidImageError(f"images[{number}]: {e}") from e
    return batch, stack([encoded[key] for key in keys], batch.tokens.shape[0])


def stack(encoded: Sequence[EncodedImages], rows: int) -> jax.Array:
    """Image tokens f[rows, N * P, W] of prompts with equally many pictures, filled with the first.

    `rows` is what the prompts were filled up to, `batch.tokens.shape[0]`.
    """
    first = encoded[0].tokens
    if all(e is encoded[0] for e in encoded):
        return jnp.broadcast_to(first, (rows, *first.shape))
    return jnp.stack([e.tokens for e in encoded] + [first] * (rows - len(encoded)))


def _identity(entry: Any) -> tuple[int, ...]:
    """Equal for entries that are the same objects, which `images` keeps alive; () for None."""
    if entry is None:
        return ()
    return tuple(map(id, entry)) if isinstance(entry, list | tuple) else (id(entry),)


@Jitted
def _encode(model: PaliGemma, images: Float[Array, "N height width 3"]) -> Float[Array, "N P W"]:
    return model.encode_images(images)


def _in_groups(model: PaliGemma, pixels: np.ndarray) -> jax.Array:
    """f[N, P, W] of pixels f32[N, H, W, 3]; four program sizes serve any number of pictures."""
    groups, place = [], by_rows(model)
    for start in range(0, len(pixels), PICTURES_AT_ONCE):
        group = pixels[start : start + PICTURES_AT_ONCE]
        fill = np.repeat(group[:1], bucket(len(group)) - len(group), axis=0)
        groups.append(_encode(model, place(np.concatenate([group, fill])))[: len(group)])
    return groups[0] if len(groups) == 1 else jnp.concatenate(groups)


def _check_fits(images: EncodedImages, model: PaliGemma) -> None:
    if images.config != model.config:
        raise ConfigError(
            "The encoded pictures come from a model of another architecture. Those of this model "
            "fit. Encode them again with it: pali.encode(image)"
        )
