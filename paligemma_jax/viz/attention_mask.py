"""Which token may see which: the attention mask of a prompt, as text and as a picture.

The masks are computed by the model's own `attention_masks`, so the picture shows what it does.
"""

import dataclasses
import functools
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.models.abstract import abstract_model
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.batch import Batch
from paligemma_jax.processing.encoding import prompt_arrays
from paligemma_jax.processing.overflow import Refuse
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import Tokenizer
from paligemma_jax.viz.mask_cells import MaskToken
from paligemma_jax.viz.mask_drawing import mask_drawing
from paligemma_jax.viz.mask_text import mask_text
from paligemma_jax.viz.token_labels import token_labels

WIDTH = 100  # columns of a terminal
MOST_CELLS = 48


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMaskView:
    """The masks of one sequence; `print` shows them.

    Attributes:
      tokens: every place of the sequence: pictures, prompt, answer, padding.
      masks: one bool[S, S] for each kind of layer; row i sees column j where [i, j] is True.
      layers: which layers each mask belongs to, in words.
    """

    tokens: tuple[MaskToken, ...]
    masks: tuple[np.ndarray, ...]
    layers: tuple[str, ...]

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int = WIDTH) -> str:
        """Blocks for a terminal of `width` columns; what does not fit is folded."""
        return mask_text(self.tokens, self.masks, self.layers, width)

    def to_image(self, most_cells: int = MOST_CELLS) -> Image.Image:
        """An RGB picture; sequences of more than `most_cells` cells are folded.

        Characters that its font lacks are written without their accent or as \\uXXXX; the SVG has
        them.
        """
        return mask_drawing(self.tokens, self.masks, self.layers, most_cells).to_image()

    def to_svg(self, most_cells: int = MOST_CELLS) -> str:
        """An SVG with title and description, and a sentence on every cell for who points at it."""
        return mask_drawing(self.tokens, self.masks, self.layers, most_cells).to_svg()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a .svg, a .txt, or a picture by its ending; raises ConfigError, OSError."""
        path = Path(path)
        ending = path.suffix.lower()
        if ending in (".svg", ".txt"):
            text = self.to_svg() if ending == ".svg" else f"{self.to_text()}\n"
            path.write_text(text, encoding="utf-8")
        elif ending in Image.registered_extensions():
            self.to_image().save(path)
        else:
            raise ConfigError(
                f"{path} does not say what to write. A name that ends in .png, .svg or .txt fits. "
                f"Choose for example: {path.stem or 'mask'}.png"
            )


def attention_mask(
    config: PaliGemmaConfig,
    processor: Processor,
    prompt: str,
    answer: str | None = None,
    *,
    images: int = 1,
    length: int | None = None,
) -> AttentionMaskView:
    """The mask of a prompt about some pictures, without any weights.

    Args:
      config: the architecture; `llm.sliding_window` decides about local layers.
      processor: tokenizer and encoding.
      prompt: as the model gets it, such as "detect cat".
      answer: None for the prompt alone (what inference begins with); text for the layout of
        training: prompt, answer, eos.
      images: number of pictures.
      length: text tokens to pad to; None is no padding.

    Raises:
      InvalidPromptError: for text that does not fit `length`.
      ConfigError: for a negative number of pictures.
    """
    ids = processor.encoding.prompt_ids(processor.tokenizer, prompt)
    more: list[int] = []
    if answer is not None:
        more = [*processor.tokenizer.encode(answer), processor.tokenizer.eos_id]
    arrays = prompt_arrays(ids, more, len(ids) + len(more) if length is None else length, Refuse())
    return _view(
        config,
        processor.tokenizer,
        arrays["text"],
        arrays["mask_ar"],
        arrays["mask_input"].astype(bool),
        images,
    )


def attention_mask_of(
    config: PaliGemmaConfig, tokenizer: Tokenizer, batch: Batch, row: int = 0
) -> AttentionMaskView:
    """The mask of one row of a batch; raises InvalidPromptError if there is no such row."""
    rows = batch.tokens.shape[0]
    if not 0 <= row < rows:
        raise InvalidPromptError(
            f"The batch has no row {row}. Rows from 0 to {rows - 1} fit. Choose row=0."
        )
    images = 0 if batch.images is None else batch.images.shape[1]
    text = (np.asarray(x)[row] for x in (batch.tokens, batch.mask_ar, batch.mask_input))
    tokens, mask_ar, mask_input = text
    return _view(config, tokenizer, tokens, mask_ar, mask_input.astype(bool), images)


def _view(
    config: PaliGemmaConfig,
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    mask_ar: np.ndarray,
    mask_input: np.ndarray,
    images: int,
) -> AttentionMaskView:
    """tokens, mask_ar i32[T] and mask_input bool[T] of the text behind `images` pictures."""
    if images < 0:
        raise ConfigError(f"{images} pictures cannot be drawn. 0 or more fit. Choose images=1.")
    before = (images * config.img.num_patches, 0)
    valid = np.pad(mask_input, before, constant_values=True)
    masks = _model(config).attention_masks(
        jnp.asarray(np.pad(mask_ar, before))[None], jnp.asarray(valid)[None]
    )
    answered = np.where(np.cumsum(mask_ar) > 0, "answer", "prompt")
    kinds = np.where(mask_input, answered, "padding")
    labels = token_labels(tokenizer, tokens.tolist())
    sequence = [
        MaskToken("image", f"img{n}", n)
        for n in range(1, images + 1)
        for _ in range(config.img.num_patches)
    ]
    sequence += [MaskToken(kind, label) for kind, label in zip(kinds.tolist(), labels, strict=True)]
    drawn = [np.asarray(mask[0]) for mask in masks]
    window = config.llm.sliding_window
    if len(drawn) == 1:
        names = ["Every layer"]
    elif (drawn[0] == drawn[1]).all():
        drawn, names = drawn[:1], [f"Every layer (the window of {window:,} is longer than this)"]
    else:
        names = [
            f"Even layers: an answer token sees the last {window:,} tokens, itself included",
            "Odd layers: the whole sequence",
        ]
    return AttentionMaskView(tuple(sequence), tuple(drawn), tuple(names))


@functools.lru_cache(maxsize=8)
def _model(config: PaliGemmaConfig) -> PaliGemma:
    """A model without weights: masks need its architecture only."""
    return abstract_model(config)
