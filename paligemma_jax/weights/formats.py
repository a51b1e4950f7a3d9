"""The formats that a model is written in, by name."""

from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from paligemma_jax.errors import ConfigError
from paligemma_jax.weights.contents import Contents
from paligemma_jax.weights.hf_writer import HuggingFace
from paligemma_jax.weights.npz_writer import BigVision
from paligemma_jax.weights.source import Weights
from paligemma_jax.weights.store import Orbax


@runtime_checkable
class Format(Protocol):
    """Writes a model in one of the formats it is published or kept in.

    Attributes:
      few_bits: whether it has room for weights of few bits.
    """

    name: ClassVar[str]
    few_bits: ClassVar[bool]

    def is_file(self, target: Path) -> bool:
        """Whether `target` is to be one file; else it is a directory."""
        ...

    def needs_tokenizer(self, target: Path) -> bool:
        """Whether a tokenizer goes along."""
        ...

    def check(self, target: Path, weights: Weights) -> None:
        """Raises CheckpointError or ConfigError for what cannot be written."""
        ...

    def write(self, target: Path, weights: Weights, contents: Contents) -> None:
        """Writes into an empty directory, or over an empty file, piece by piece; raises OSError."""
        ...


FORMATS: dict[str, Format] = {
    format.name: format for format in (Orbax(), HuggingFace(), BigVision())
}


def find_format(format: str | Format) -> Format:
    """The format of a name, or the very one given; raises ConfigError for an unknown name."""
    if not isinstance(format, str):
        return format
    if format not in FORMATS:
        raise ConfigError(
            f"There is no format {format!r}. {', '.join(FORMATS)} fit. Say for example: "
            'format="huggingface" (--to huggingface)'
        )
    return FORMATS[format]
