"""What every checkpoint format offers: a reader of its tensors, and a writer of new checkpoints."""

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from paligemma_jax.models.quantization_config import QuantizationConfig
from paligemma_jax.weights.tensors import TensorSource


class CheckpointReader(TensorSource):
    """An opened checkpoint whose tensors match `config`; nothing but headers has been read.

    Attributes:
      kind: "big_vision", "huggingface" or "orbax" (native).
      origin: where the weights came from: "kind" and, from Hugging Face, "sliding_window".
      quantization: the formats of quantized weights; None for floats.
    """

    kind: ClassVar[str]
    path: Path
    origin: dict[str, Any]
    quantization: QuantizationConfig | None = None

    @abc.abstractmethod
    def processor_settings(self) -> dict[str, Any]:
        """How images and prompts are prepared, for `Processor.from_dict`."""

    def close(self) -> None:  # noqa: B027, readers without open files need none
        """Releases open files."""


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """Everything of a checkpoint but its weights and their configuration.

    Attributes:
      processor: how images and prompts are prepared, for `Processor.from_dict`.
      tokenizer: the SentencePiece model; None only for a single file of weights.
      mask_codec: an npz of the codec of <seg> tokens.
      origin: where the weights came from.
      quantization: the formats of quantized weights; None for floats.
      tokenizer_files: Hugging Face's own files of the same tokenizer, to be copied as they are.
    """

    processor: Mapping[str, Any]
    tokenizer: bytes | None
    mask_codec: bytes | None = None
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quantization: QuantizationConfig | None = None
    tokenizer_files: Mapping[str, Path] = dataclasses.field(default_factory=dict)


class CheckpointFormat(abc.ABC):
    """Writes a model in one of the formats it is published or kept in.

    Attributes:
      quantized: whether it can hold quantized weights.
    """

    name: ClassVar[str]
    quantized: ClassVar[bool] = False

    def is_file(self, target: Path) -> bool:
        """Whether `target` is to be one file without a tokenizer; else it is a directory."""
        return False

    def check(self, target: Path, source: TensorSource) -> None:  # noqa: B027
        """Raises CheckpointError or ConfigError for what cannot be written, before anything is."""

    @abc.abstractmethod
    def write(self, target: Path, source: TensorSource, metadata: CheckpointMetadata) -> None:
        """Writes into an empty directory, or over an empty file, chunk by chunk; raises OSError."""
