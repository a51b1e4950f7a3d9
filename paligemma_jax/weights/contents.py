"""What goes with a model's weights into a checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.models.recipe import Mixed


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything of a checkpoint but its weights and their configuration.

    Attributes:
      processor: how pictures and prompts are prepared, for `Processor.from_dict`.
      tokenizer: the SentencePiece model; None only for a file that has room for weights alone.
      mask_codec: an npz of the codec of <seg> tokens.
      origin: where the weights came from.
      recipe: that the weights are rounded by; None for floats.
      tokenizer_files: Hugging Face's own files of the same tokenizer, to be copied as they are.
    """

    processor: Mapping[str, Any]
    tokenizer: bytes | None
    mask_codec: bytes | None = None
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recipe: Mixed | None = None
    tokenizer_files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
