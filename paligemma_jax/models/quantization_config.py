"""How weights are quantized: a format for each kind of weight, as values or as text.

Text is a format for the language model ("int4"), "mixed", or formats by kind of weight
("attention=int8,mlp=int4:128"). This module imports no jax, so that `paligemma --help` stays fast.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from paligemma_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Int8:
    """8 bits a weight and a scale for each output channel; activations keep their dtype."""


@dataclasses.dataclass(frozen=True)
class Int8Dynamic:
    """As `Int8`, with activations quantized to 8 bits too, token by token, as they come.

    On CPUs this is the fastest; outputs differ more. See `DynamicMatrix`.
    """


@dataclasses.dataclass(frozen=True)
class Float8:
    """8 bits a weight as a float (e4m3) and a scale for each output channel.

    For devices with float8 arithmetic; a CPU is correct and slow. Small weights keep more of their
    digits than in `Int8`, large ones fewer.
    """


@dataclasses.dataclass(frozen=True)
class Int4:
    """4 bits a weight, with a scale for each `group` of inputs of each output channel.

    There is one scale for the whole output channel where `group` is None, or where it does not
    divide the inputs. Scales of groups are bfloat16: 4.25 bits a weight in groups of 64. Groups of
    128 take 4.125, but XLA for GPUs cannot always apply their scales inside of a matmul: not where
    it splits matrices of PaliGemma 2.
    """

    group: int | None = 64

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 2:
            raise ConfigError(
                f"Expected a group of at least 2 inputs, got {self.group}. Pass None for one scale "
                "per output channel, or Int4(group=64)."
            )

    def groups(self, columns: int) -> int:
        """Scales of an output channel of so many inputs."""
        return 1 if self.group is None or columns % self.group else columns // self.group


QuantizedFormat = Int8 | Int8Dynamic | Int4 | Float8

KINDS = ("attention", "mlp", "embedding", "image")
FORMATS = ("int8", "int8-dynamic", "int4", "float8")
EXPECTED = (
    f"{', '.join(FORMATS)}, mixed, or formats by kind of weight, such as "
    "'attention=int8,mlp=int4:128,embedding=int8,image=int8'"
)
_FORMAT = re.compile(r"int8|int8-dynamic|float8|int4(:(row|[1-9]\d{0,5}))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """A format for each kind of weight; None leaves it as it is. `str` of it can be parsed again.

    Attributes:
      attention, mlp: of the decoder's layers.
      embedding: the embedding table, which is read whole for every new token, and the output head
        too where it is separate.
      image: image encoder and the projection after it, patch embedding left out.
    """

    attention: QuantizedFormat | None = Int8()
    mlp: QuantizedFormat | None = Int8()
    embedding: QuantizedFormat | None = Int8()
    image: QuantizedFormat | None = None

    @classmethod
    def of(cls, quantize: "QuantizedFormat | QuantizationConfig | str") -> "QuantizationConfig":
        """The formats that `quantize` stands for; raises ConfigError for unknown text.

        A single format is for the language model; 4 bits leave its embedding table at 8. "mixed" is
        8 bits for attention, embedding and image encoder, 4 for the MLPs. Kinds of weight that text
        does not name stay as they are.
        """
        if isinstance(quantize, QuantizationConfig):
            return quantize
        if not isinstance(quantize, str):
            embedding = Int8() if isinstance(quantize, Int4) else quantize
            return cls(attention=quantize, mlp=quantize, embedding=embedding)
        if quantize == "mixed":
            return cls(mlp=Int4(), image=Int8())
        if (format := _parse_format(quantize)) is not None:
            return cls.of(format)
        if "=" not in quantize:
            raise ConfigError(f"Expected {EXPECTED}; got {quantize!r}.")
        pairs = [part.partition("=") for part in quantize.split(",")]
        names = {kind.strip(): name.strip() for kind, _, name in pairs}
        if len(names) < len(pairs):
            raise ConfigError(f"A kind of weight is named twice in {quantize!r}.")
        return cls.from_dict(dict.fromkeys(KINDS) | names)

    @classmethod
    def from_dict(cls, names: Mapping[str, Any]) -> "QuantizationConfig":
        """Inverse of `to_dict`; raises ConfigError naming everything that is unknown or missing."""
        problems = [f"there is no kind of weight {kind!r}" for kind in names if kind not in KINDS]
        problems += [f"{kind} is missing" for kind in KINDS if kind not in names]
        for kind, name in names.items():
            if name not in (None, "none") and _parse_format(name) is None:
                problems.append(f"there is no format {name!r} (of {kind})")
        if problems:
            raise ConfigError(
                f"The quantization config is invalid: {'; '.join(problems)}. Expected {EXPECTED}."
            )
        return cls(**{kind: _parse_format(name) for kind, name in names.items()})

    def to_dict(self) -> dict[str, str | None]:
        """The name of each kind's format, ready for JSON."""
        return {kind: _format_name(getattr(self, kind)) for kind in KINDS}

    def __str__(self) -> str:
        names = self.to_dict().items()
        return ",".join(f"{kind}={name}" for kind, name in names if name is not None)

    def format_of(self, path: str) -> QuantizedFormat | None:
        """The format of a parameter of a stacked or unstacked model, by its path."""
        match path.split("/"):
            case ["llm", "layers", *_, ("attn" | "mlp") as kind, _, _]:
                return self.attention if kind == "attn" else self.mlp
            case ["llm", "embedder" | "lm_head", _]:
                return self.embedding
            case ["img", "blocks", *_, "kernel"] | ["img", "head", "kernel"]:
                return self.image
        return None


Quantization = QuantizedFormat | QuantizationConfig


def _format_name(format: QuantizedFormat | None) -> str | None:
    match format:
        case None:
            return None
        case Int8():
            return "int8"
        case Int8Dynamic():
            return "int8-dynamic"
        case Float8():
            return "float8"
        case Int4(group=group):
            return f"int4:{group or 'row'}"


def _parse_format(name: object) -> QuantizedFormat | None:
    """None for what is no format."""
    if not isinstance(name, str) or not _FORMAT.fullmatch(name):
        return None
    kind, _, group = name.partition(":")
    if kind == "int4":
        return Int4(None if group == "row" else int(group or 64))
    return {"int8": Int8(), "int8-dynamic": Int8Dynamic(), "float8": Float8()}[kind]
