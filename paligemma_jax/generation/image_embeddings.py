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
from paligemma_jax.generation.devices import batch_placement
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
        return _checked(images, model)
    sources = images_of(images)
    if not sources:
        raise InvalidImageError("expected an image, or a list of at least one, got none.")
    return _encoded(model, sources, _read(preprocessing, {0: sources}, allow_urls))


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
    lists = isinstance(images, Sequence | None) and not isinstance(images, str)
    if isinstance(prompts, str) or not lists:
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
            named = len(prompts) > 1
            yield _with_images(model, processor.image, found, batch, allow_urls, named=named)


def _with_images(
    model: PaliGemma,
    preprocessing: ImagePreprocessing,
    entries: dict[int, Any],
    batch: Batch,
    allow_urls: bool,
    *,
    named: bool,
) -> PromptBatch:
    """Adds images by their number among all prompts, encoded where they are shared.

    Errors give this number if `named`.
    """
    keys = [_identity(entry) for entry in entries.values()]
    given = [entry for entry in entries.values() if isinstance(entry, EncodedImages)]
    size, numbers = batch.tokens.shape[0], list(entries)
    sources = {n: images_of(e) for n, e in entries.items() if not isinstance(e, EncodedImages)}
    read = _read(preprocessing, sources, allow_urls, named=named)
    if given or (len(set(keys)) < len(keys) and any(keys)):
        encoded: dict[tuple[int, ...], EncodedImages] = {}
        for key, (number, entry) in zip(keys, entries.items(), strict=True):
            if isinstance(entry, EncodedImages):
                encoded[key] = _checked(entry, model)
            elif key not in encoded:
                encoded[key] = _encoded(model, sources[number], read)
        own = [encoded[key] for key in keys]
        return PromptBatch(numbers, batch, stack(own, size), [e.sizes for e in own])
    sizes = [tuple(read[id(image)][1] for image in images) for images in sources.values()]
    if sizes[0]:
        rows = [np.stack([read[id(x)][0] for x in images]) for images in sources.values()]
        filled = np.stack(rows + rows[:1] * (size - len(rows)))
        batch = dataclasses.replace(batch, images=filled)
    return PromptBatch(numbers, batch, None, sizes)


def _read(
    preprocessing: ImagePreprocessing,
    sources: dict[int, list[Any]],
    allow_urls: bool,
    *,
    named: bool = False,
) -> dict[int, tuple[np.ndarray, tuple[int, int]]]:
    """Each image once: pixels f32[H, W, 3] and size in the file, by `id`; names what is wrong."""
    read: dict[int, tuple[np.ndarray, tuple[int, int]]] = {}
    for number, images in sources.items():
        for image in images:
            if id(image) not in read:
                try:
                    loaded = load_image(image, allow_urls=allow_urls)
                except InvalidImageError as e:
                    where = f"images[{number}]: " if named else ""
                    raise InvalidImageError(f"{where}{e}") from e
                read[id(image)] = preprocessing.preprocess(loaded), loaded.size
    return read


def _encoded(
    model: PaliGemma, images: list[Any], read: dict[int, tuple[np.ndarray, tuple[int, int]]]
) -> EncodedImages:
    """The images of one prompt, each object encoded once."""
    distinct = list(dict.fromkeys(map(id, images)))
    tokens = _in_groups(model, np.stack([read[key][0] for key in distinct]))
    order = [distinct.index(id(image)) for image in images]
    if order != list(range(len(distinct))):
        tokens = tokens[np.array(order)]
    sizes = tuple(read[id(image)][1] for image in images)
    return EncodedImages(tokens.reshape(-1, tokens.shape[-1]), sizes, model.config)


def _checked(images: EncodedImages, model: PaliGemma) -> EncodedImages:
    if images.config != model.config:
        raise ConfigError(
            "expected images that this model encoded, got those of a model of another "
            "architecture. Encode them again: pali.encode(image)"
        )
    return images


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
    groups, place = [], batch_placement(model)
    for start in range(0, len(pixels), IMAGES_AT_ONCE):
        group = pixels[start : start + IMAGES_AT_ONCE]
        fill = np.repeat(group[:1], bucket(len(group)) - len(group), axis=0)
        groups.append(_encode(model, place(np.concatenate([group, fill])))[: len(group)])
    return groups[0] if len(groups) == 1 else jnp.concatenate(groups)
