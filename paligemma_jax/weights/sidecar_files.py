"""What lies beside the weights: image and text settings, tokenizer, mask codec, checksums, parts.

big_vision's checkpoints and Hugging Face's were trained on the same data, but their implementations
resize and tokenize differently; a checkpoint is run with the preprocessing of where it came from.
"""

import dataclasses
import hashlib
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paligemma_jax.config import VARIANTS, GemmaConfig, PaliGemmaConfig
from paligemma_jax.errors import CheckpointError, problem_list
from paligemma_jax.filesystem import read_json
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
# Ours, in native checkpoints and beside weights, and the published one.
MASK_CODEC = "mask_codec.npz"
MASK_CODECS = (MASK_CODEC, "vae-oid.npz")
# What Hugging Face's image processor may be told: the settings published with PaliGemma.
_KNOWN_SETTINGS = {
    "resample": (3,),  # PIL's bicubic
    "image_mean": ([0.5] * 3, 0.5),
    "image_std": ([0.5] * 3, 0.5),
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
}


def big_vision_processor(config: PaliGemmaConfig) -> dict[str, Any]:
    """Settings for `Processor.from_dict` as big_vision prepares images and prompts."""
    image = ImagePreprocessing(config.img.image_size, BILINEAR)
    return {"image": image.to_dict(), "encoding": "big_vision"}


def hugging_face_processor(directory: Path, config: PaliGemmaConfig) -> dict[str, Any]:
    """The same for a Hugging Face directory; CheckpointError if its settings are others.

    Reads preprocessor_config.json or processor_config.json; without either, the settings that all
    published ones have.
    """
    path, settings = directory / "preprocessor_config.json", {}
    if path.is_file():
        settings = read_json(path)
    else:
        path = directory / "processor_config.json"  # where transformers 5 writes them
        found = read_json(path).get("image_processor") if path.is_file() else None
        settings = found if isinstance(found, dict) else {}
    size = settings.get("size", config.img.image_size)
    if isinstance(size, dict):
        size = size.get("height") if size.get("height") == size.get("width") else size
    problems = [
        f"{name} is {settings[name]!r}, only {known[0]!r} is supported"
        for name, known in _KNOWN_SETTINGS.items()
        if settings.get(name) is not None and settings[name] not in known
    ]
    factor = settings.get("rescale_factor") or 1 / 255
    if not isinstance(factor, float) or abs(factor - 1 / 255) > 1e-9:
        problems.append(f"rescale_factor is {factor!r}, only 1/255 is supported")
    if size != config.img.image_size:
        problems.append(f"size is {size!r}, the weights are for {config.img.image_size}")
    if problems:
        raise CheckpointError(
            f"{path} has other settings than PaliGemma's {problem_list(problems)}\n"
            "Download the file again from where the weights are from."
        )
    image = ImagePreprocessing(config.img.image_size, BICUBIC)
    return {"image": image.to_dict(), "encoding": "huggingface"}


def find_tokenizer(kind: str, path: Path) -> Path | None:
    """The tokenizer file beside the weights at `path`, if there is one."""
    return _beside(path, _HF_TOKENIZERS if kind == "huggingface" else _BIG_VISION_TOKENIZERS)


def find_mask_codec(path: Path) -> Path | None:
    """The codec of <seg> tokens in a directory, or beside the weights at `path`."""
    return _beside(path, MASK_CODECS)


def _beside(path: Path, names: tuple[str, ...]) -> Path | None:
    directory = path if path.is_dir() else path.parent
    return next((directory / name for name in names if (directory / name).is_file()), None)


def hugging_face_tokenizer_files(directory: Path) -> dict[str, Path]:
    """The tokenizer's files that are there, by name."""
    found = {name: directory / name for name in _HF_TOKENIZER_FILES}
    return {name: path for name, path in found.items() if path.is_file()}


def with_text_length(config: PaliGemmaConfig, path: Path) -> PaliGemmaConfig:
    """`config` with the text length its published checkpoint was trained with.

    Fine-tunes share an architecture, so a published name in `path` decides; without one it is the
    pretrained checkpoint's. An unpublished architecture keeps the length it has.
    """
    sizes = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    same = [
        name
        for name, variant in VARIANTS.items()
        if variant.img == config.img
        and all(getattr(variant.llm, size) == getattr(config.llm, size) for size in sizes)
    ]
    if not same:
        return config
    # "pt" stands before all others in the table; the longest of several names is the whole one.
    named = [name for name in same if name in str(path.absolute())]
    name = max(named, key=len) if named else same[0]
    return dataclasses.replace(config, text_length=VARIANTS[name].text_length)


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


SUMS = "SHA256SUMS"
_SUMS_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(directory: Path) -> None:
    """Writes SHA256SUMS of all files that are there, as the sha256sum program does."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    lines = (f"{file_sha256(path)}  {path.relative_to(directory).as_posix()}\n" for path in paths)
    (directory / SUMS).write_text("".join(lines))


def changed_files(directory: Path) -> list[str]:
    """A line for each file of SHA256SUMS that is missing or changed."""
    found = [_SUMS_LINE.fullmatch(line) for line in (directory / SUMS).read_text().splitlines()]
    named = {line[2]: line[1] for line in found if line is not None}
    if not named or None in found or any(Path(n).is_absolute() or ".." in n for n in named):
        return [f"{SUMS} is not a list of checksums as sha256sum writes it"]
    return checksum_problems(directory, named)


def checksum_problems(directory: Path, checksums: Mapping[str, str]) -> list[str]:
    """A line for each file that is missing or has another sha256."""
    problems = []
    for name, sha256 in checksums.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif file_sha256(path) != sha256:
            problems.append(f"{name} was changed (sha256 differs)")
    return problems


_PART = re.compile(r"(?P<stem>.+)\.part[_-]?(?P<number>\d+)$")


def find_parts(path: Path) -> list[Path]:
    """The parts of a file in order (`model.npz.part0`, ...), by its name or that of any part.

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
    wanted = range(min(min(numbered), 1), max(numbered) + 1)  # parts count from 0 or from 1
    missing = [str(n) for n in wanted if n not in numbered]
    if missing:
        raise CheckpointError(
            f"{path.parent / stem} lacks its part {', '.join(missing[:20])} of {len(wanted)}. "
            "Download the missing parts next to the others."
        )
    return [numbered[n] for n in sorted(numbered)]


class PartsFile(io.RawIOBase):
    """Several files as one seekable, read-only file."""

    def __init__(self, paths: list[Path]):
        self._files = [path.open("rb") for path in paths]
        self._sizes = [path.stat().st_size for path in paths]
        self.size = sum(self._sizes)
        self._position = 0

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
