"""Images through the image encoder once, for any number of prompts; and batches of prompts.

What is kept is what the encoder gives: one vector a patch, before the decoder. The decoder's keys
and values of these image tokens cannot be kept for the next prompt. PaliGemma is a prefix-LM: image
tokens see the prompt as the prompt sees them. The first layer's keys and values still depend on the
image alone, but what that layer passes on has looked at the prompt, so from the second layer on
they are different for every prompt. (A model that is causal over the whole sequence could keep
them.) All answers to one prompt do share them: answers are causal, and the prefix never sees them.

Letters: B prompts, N images a prompt, P patches an image, W decoder width.
"""

import dataclasses
from collections.abc import Iterator, Sequence
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
    images_of,
)

IMAGES_AT_ONCE = 8  # through the encoder; bounds memory when a video has many frames
BATCH_SIZE = 32
Sizes = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedImages:
    """The images of one prompt, encoded: given in place of them, they are not encoded again.

    Attributes:
      tokens: f[N * P, W] on the device, in the model's dtype, image after image.
      sizes: width and height in pixels of each image, for boxes in pixels.
      config: of the model that encoded them; another model's embeddings mean something else.
    """

    tokens: jax.Array
    sizes: Sizes
    config: PaliGemmaConfig

    def __len__(self) -> int:
        """Number of images."""
        return len(self.sizes)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.tokens.shape))
        return f"EncodedImages({len(self)} images, tokens {self.tokens.dtype}[{shape}])"


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Some of many prompts, ready for the model.

    Attributes:
      indices: which they are among all.
      batch: text, and images unless these are encoded.
      image_tokens: f[B, N * P, W], images that are encoded; None where `batch` has them.
      sizes: width and height in pixels of each prompt's images.
    """

    indices: Sequence[int]
    batch: Batch
    image_tokens: jax.Array | None
    sizes: Sequence[Sizes]


def encode(
    model: PaliGemma,
    preprocessing: ImagePreprocessing,
    images: Any,
    *,
    allow_urls: bool = False,
) -> EncodedImages:
    """Encodes an image, or the several images (or video frames) of one prompt, in their order.

    The same object given several times is read and encoded once. Raises InvalidImageError.
    """
    if isinstance(images, EncodedImages):
        if images.config != model.config:
            raise ConfigError(
                "expected images that this model encoded, got those of a model of another "
                "architecture. Encode them again: pali.encode(image)"
            )
        return images
    entries = images_of(images)
    if not entries:
        raise InvalidImageError("expected an image, or a list of at least one, got none.")
    distinct = {id(image): image for image in entries}  # by identity, as in Processor
    reader = _Reader(preprocessing, allow_urls)
    tokens = _in_groups(model, np.stack([reader.pixels(image) for image in distinct.values()]))
    places = {key: place for place, key in enumerate(distinct)}
    order = [places[id(image)] for image in entries]
    if order != list(range(len(distinct))):
        tokens = tokens[np.array(order)]
    return EncodedImages(
        tokens=tokens.reshape(-1, tokens.shape[-1]),
        sizes=tuple(reader.size(image) for image in entries),
        config=model.config,
    )


def prompt_batches(
    model: PaliGemma,
    processor: Processor,
    images: Any,
    prompts: Any,
    *,
    answer_prefixes: Any = None,
    batch_size: Any = BATCH_SIZE,
    allow_urls: bool = False,
) -> Iterator[PromptBatch]:
    """All prompts as few batches, those with equally many images together.

    `images` has an entry for each prompt: an image, a list of images, EncodedImages or None. An
    entry that several prompts of a batch share is encoded once. Images are read when their batch
    comes. Raises InvalidPromptError, InvalidImageError and ConfigError, naming the entry.
    """
    if (
        isinstance(prompts, str)
        or not isinstance(images, Sequence | None)
        or isinstance(images, str)
    ):
        raise InvalidPromptError(
            f"expected a list of images and a list of prompts, got {type(images).__name__} and "
            f"{type(prompts).__name__}. Call generate([image], [prompt])[0]"
        )
    entries = [None] * len(prompts) if images is None else list(images)
    for name, values in (("images", entries), ("answer_prefixes", answer_prefixes)):
        if isinstance(values, str) or (values is not None and len(values) != len(prompts)):
            found = "a str" if isinstance(values, str) else f"a list of {len(values)}"
            raise InvalidPromptError(
                f"{name}: expected a list of one for each of {len(prompts)} prompts, got {found}."
            )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(
            f"batch_size: expected a whole number of at least 1, got {batch_size!r}. Leave it out "
            f"for {BATCH_SIZE}."
        )
    sizes = [e.sizes if isinstance(e, EncodedImages) else e for e in entries]
    for places in group_by_image_count(sizes).values():
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            prefixes = None if answer_prefixes is None else [answer_prefixes[i] for i in chosen]
            batch = processor(None, [prompts[i] for i in chosen], answers=prefixes)
            found = {i: entries[i] for i in chosen}
            yield _with_images(model, processor.image, found, batch, allow_urls)


def _with_images(
    model: PaliGemma,
    preprocessing: ImagePreprocessing,
    entries: dict[int, Any],
    batch: Batch,
    allow_urls: bool,
) -> PromptBatch:
    """Adds images by their number among all prompts, encoded where they are shared."""
    keys = [_identity(entry) for entry in entries.values()]
    encoded_already = any(isinstance(entry, EncodedImages) for entry in entries.values())
    shared = len(set(keys)) < len(keys) and any(keys)
    size, several = batch.tokens.shape[0], len(entries) > 1
    if encoded_already or shared:
        encoded: dict[tuple[int, ...], EncodedImages] = {}
        for key, (number, entry) in zip(keys, entries.items(), strict=True):
            if key not in encoded:
                try:
                    encoded[key] = encode(model, preprocessing, entry, allow_urls=allow_urls)
                except InvalidImageError as e:
                    raise InvalidImageError(f"images[{number}]: {e}" if several else str(e)) from e
        own = [encoded[key] for key in keys]
        return PromptBatch(list(entries), batch, stack(own, size), [e.sizes for e in own])
    reader, rows, sizes = _Reader(preprocessing, allow_urls), [], []
    for number, entry in entries.items():
        images = images_of(entry)
        try:
            rows.append([reader.pixels(image) for image in images])
        except InvalidImageError as e:
            raise InvalidImageError(f"images[{number}]: {e}" if several else str(e)) from e
        sizes.append(tuple(reader.size(image) for image in images))
    if rows[0]:
        filled = np.stack([np.stack(row) for row in rows + rows[:1] * (size - len(rows))])
        batch = dataclasses.replace(batch, images=filled)
    return PromptBatch(list(entries), batch, None, sizes)


class _Reader:
    """Reads each image once, by identity; its entries must be kept alive."""

    def __init__(self, preprocessing: ImagePreprocessing, allow_urls: bool):
        self._preprocessing, self._allow_urls = preprocessing, allow_urls
        self._read: dict[int, tuple[np.ndarray, tuple[int, int]]] = {}

    def pixels(self, image: Any) -> np.ndarray:
        """f32[H, W, 3], preprocessed."""
        if id(image) not in self._read:
            loaded = load_image(image, allow_urls=self._allow_urls)
            self._read[id(image)] = self._preprocessing.preprocess(loaded), loaded.size
        return self._read[id(image)][0]

    def size(self, image: Any) -> tuple[int, int]:
        """Width and height of an image that was read."""
        return self._read[id(image)][1]


def stack(encoded: Sequence[EncodedImages], size: int) -> jax.Array:
    """Image tokens f[size, N * P, W] of prompts with equally many images, filled with the first.

    `size` is what the batch was filled up to, `batch.tokens.shape[0]`.
    """
    first = encoded[0].tokens
    if all(e is encoded[0] for e in encoded):
        return jnp.broadcast_to(first, (size, *first.shape))
    return jnp.stack([e.tokens for e in encoded] + [first] * (size - len(encoded)))


def _identity(entry: Any) -> tuple[int, ...]:
    """Equal for entries that are the same objects, which the caller keeps alive; () for None."""
    if entry is None:
        return ()
    return tuple(map(id, entry)) if isinstance(entry, list | tuple) else (id(entry),)


@Jitted
def _encode(model: PaliGemma, images: Float[Array, "N height width 3"]) -> Float[Array, "N P W"]:
    return model.encode_images(images)


def _in_groups(model: PaliGemma, pixels: np.ndarray) -> jax.Array:
    """f[N, P, W] of pixels f32[N, H, W, 3]; four program sizes serve any number of images."""
    groups, place = [], by_rows(model)
    for start in range(0, len(pixels), IMAGES_AT_ONCE):
        group = pixels[start : start + IMAGES_AT_ONCE]
        fill = np.repeat(group[:1], bucket(len(group)) - len(group), axis=0)
        groups.append(_encode(model, place(np.concatenate([group, fill])))[: len(group)])
    return groups[0] if len(groups) == 1 else jnp.concatenate(groups)
