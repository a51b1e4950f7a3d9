"""What lies beside the weights: how pictures and prompts are prepared, tokenizer, mask codec.

big_vision's checkpoints and Hugging Face's were trained on the same data, but their implementations
resize and tokenize differently; a checkpoint is answered with the ways of where it came from.

What the files of a checkpoint do not say, taken from the table of published ones.

What goes with a model's weights into a checkpoint.

How large a model is: exact parameters of each part, and memory at each precision.

One large file published in pieces (`model.npz.part0`, `.part1`, ...), read as one.
"""

import dataclasses
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.config import VARIANTS, GemmaConfig, PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.filesystem import read_json
from paligemma_jax.models.quantization_config import QuantizationConfig
from paligemma_jax.processing.image import BICUBIC, BILINEAR, ImagePreprocessing
from paligemma_jax.weights.tensors import expected_shapes

BIG_VISION_TOKENIZER = "paligemma_tokenizer.model"
_HF_TOKENIZERS = ("tokenizer.model", "tokenizer.json")
_BIG_VISION_TOKENIZERS = (BIG_VISION_TOKENIZER, "tokenizer.model", "gemma_tokenizer.model")
# All that a Hugging Face directory says about its tokenizer.
_HF_TOKENIZER_FILES = (
    *_HF_TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Ours, in stores and beside weights, and the published one.
MASK_CODEC = "mask_codec.npz"
MASK_CODECS = (MASK_CODEC, "vae-oid.npz")
_PIL_BICUBIC = 3


def big_vision_processor(config: PaliGemmaConfig) -> dict[str, Any]:
    """Settings for `Processor.from_dict` as big_vision prepares pictures and prompts."""
    image = ImagePreprocessing(config.img.image_size, BILINEAR)
    return {"image": image.to_dict(), "encoding": "big_vision"}


def hugging_face_processor(directory: Path, config: PaliGemmaConfig) -> dict[str, Any]:
    """The same for a Hugging Face directory; CheckpointError if its settings are others.

    Reads preprocessor_config.json or processor_config.json; without either, the settings that all
    published ones have.
    """
    path, settings = _image_settings(directory)
    size = settings.get("size", config.img.image_size)
    if isinstance(size, dict):
        size = size.get("height") if size.get("height") == size.get("width") else size
    known = {
        "resample": (_PIL_BICUBIC,),
        "image_mean": ([0.5] * 3, 0.5),
        "image_std": ([0.5] * 3, 0.5),
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
    }
    problems = [
        f"{name} is {settings[name]!r}, only {fits[0]!r} is known"
        for name, fits in known.items()
        if settings.get(name) is not None and settings[name] not in fits
    ]
    factor = settings.get("rescale_factor") or 1 / 255
    if not isinstance(factor, float) or abs(factor - 1 / 255) > 1e-9:
        problems.append(f"rescale_factor is {factor!r}, only 1/255 is known")
    if size != config.img.image_size:
        problems.append(f"size is {size!r}, the weights are for {config.img.image_size}")
    if problems:
        listing = "\n  ".join(problems)
        raise CheckpointError(
            f"{path} does not fit ({len(problems)} problems):\n"
            f"  {listing}\n"
            "The settings published with PaliGemma fit. Download the file again from where the "
            "weights are from."
        )
    image = ImagePreprocessing(config.img.image_size, BICUBIC)
    return {"image": image.to_dict(), "encoding": "huggingface"}


def _image_settings(directory: Path) -> tuple[Path, dict[str, Any]]:
    path = directory / "preprocessor_config.json"
    if path.is_file():
        return path, read_json(path)
    path = directory / "processor_config.json"  # where transformers 5 writes them
    settings = read_json(path).get("image_processor") if path.is_file() else None
    return path, settings if isinstance(settings, dict) else {}


def find_tokenizer(kind: str, path: Path) -> Path | None:
    """The tokenizer file beside the weights at `path`, if there is one."""
    names = _HF_TOKENIZERS if kind == "huggingface" else _BIG_VISION_TOKENIZERS
    directory = path if path.is_dir() else path.parent
    return next((directory / name for name in names if (directory / name).is_file()), None)


def hugging_face_tokenizer_files(directory: Path) -> dict[str, Path]:
    """What lies there of a tokenizer, by name."""
    found = {name: directory / name for name in _HF_TOKENIZER_FILES}
    return {name: path for name, path in found.items() if path.is_file()}


def find_mask_codec(path: Path) -> Path | None:
    """The codec of <seg> tokens in a store, or beside the weights at `path`, if there is one."""
    directory = path if path.is_dir() else path.parent
    return next((directory / n for n in MASK_CODECS if (directory / n).is_file()), None)


def with_text_length(config: PaliGemmaConfig, path: Path) -> PaliGemmaConfig:
    """`config` with the text length its published checkpoint was trained with.

    Fine-tunes share an architecture, so a published name in `path` decides; without one it is the
    pretrained checkpoint's. An unpublished architecture keeps the length it has.
    """
    same = [name for name, variant in VARIANTS.items() if _alike(variant, config)]
    named = [name for name in same if name in str(path.absolute())]
    if not same:
        return config
    # "pt" stands before all others in the table; the longest of several names is the whole one.
    name = max(named, key=len) if named else same[0]
    return dataclasses.replace(config, text_length=VARIANTS[name].text_length)


def _alike(a: PaliGemmaConfig, b: PaliGemmaConfig) -> bool:
    sizes = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    return a.img == b.img and all(getattr(a.llm, n) == getattr(b.llm, n) for n in sizes)


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything of a checkpoint but its weights and their configuration.

    Attributes:
      processor: how pictures and prompts are prepared, for `Processor.from_dict`.
      tokenizer: the SentencePiece model; None only for a file that has room for weights alone.
      mask_codec: an npz of the codec of <seg> tokens.
      origin: where the weights came from.
      quantization: that the weights are rounded by; None for floats.
      tokenizer_files: Hugging Face's own files of the same tokenizer, to be copied as they are.
    """

    processor: Mapping[str, Any]
    tokenizer: bytes | None
    mask_codec: bytes | None = None
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quantization: QuantizationConfig | None = None
    tokenizer_files: Mapping[str, Path] = dataclasses.field(default_factory=dict)


# Bits of one weight. The scales that int8 and int4 need beside the weights are not counted.
PRECISIONS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
_PARTS = {
    "img/head": "projection",
    "img": "image encoder",
    "llm/embedder": "token embeddings",
    "llm/lm_head": "output head",
    "llm": "decoder layers",
}


def parameter_counts(config: PaliGemmaConfig) -> dict[str, int]:
    """Exact number of weights of each part of the model that `config` describes."""
    counts: dict[str, int] = {}
    for path, shape in expected_shapes(config).items():
        part = next(name for prefix, name in _PARTS.items() if path.startswith(prefix + "/"))
        counts[part] = counts.get(part, 0) + math.prod(shape)
    return counts


def weight_bytes(config: PaliGemmaConfig) -> dict[str, int]:
    """Bytes of all weights at each of `PRECISIONS`."""
    total = sum(parameter_counts(config).values())
    return {name: math.ceil(total * bits / 8) for name, bits in PRECISIONS.items()}


def cache_bytes_per_token(config: GemmaConfig, bits: int) -> int:
    """Bytes that keys and values of one token of one sequence take at `bits` a number."""
    return 2 * config.depth * config.num_kv_heads * config.head_dim * bits // 8


_PART = re.compile(r"(?P<stem>.+)\.part[_-]?(?P<number>\d+)$")


def find_parts(path: Path) -> list[Path]:
    """The pieces of `path` in order; `path` is the whole file's name or that of any piece.

    Empty when there are none. Raises CheckpointError when a number is missing between them.
    """
    match = _PART.match(path.name)
    stem = match["stem"] if match else path.name
    if not path.parent.is_dir():
        return []
    numbered: dict[int, Path] = {}
    for sibling in path.parent.iterdir():
        part = _PART.match(sibling.name)
        if part and part["stem"] == stem:
            numbered[int(part["number"])] = sibling
    if not numbered:
        return []
    wanted = range(min(min(numbered), 1), max(numbered) + 1)  # pieces count from 0 or from 1
    missing = [str(n) for n in wanted if n not in numbered]
    if missing:
        raise CheckpointError(
            f"{path.parent / stem} lacks its part {', '.join(missing)} of {len(wanted)}. All "
            "pieces in one directory fit. Download the missing ones next to the others."
        )
    return [numbered[n] for n in sorted(numbered)]


class PartsFile(io.RawIOBase):
    """Several files as one seekable, read-only file."""

    def __init__(self, paths: list[Path]):
        self._files = [path.open("rb") for path in paths]
        self._sizes = [path.stat().st_size for path in paths]
        self._position = 0

    @property
    def size(self) -> int:
        """Bytes of all parts together."""
        return sum(self._sizes)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise OSError(f"negative position {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads up to the end of the current part, as raw files may; 0 at the end of the last."""
        offset = self._position
        for file, size in zip(self._files, self._sizes, strict=True):
            if offset < size:
                file.seek(offset)
                count = file.readinto(memoryview(buffer)[: size - offset])
                self._position += count
                return count
            offset -= size
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
