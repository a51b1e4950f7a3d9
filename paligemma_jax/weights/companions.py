"""What lies beside the weights: how pictures and prompts are prepared, tokenizer, mask codec.

big_vision's checkpoints and Hugging Face's were trained on the same data, but their implementations
resize and tokenize differently; a checkpoint is answered with the ways of where it came from.
"""

from pathlib import Path
from typing import Any

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.processing.encoding import OnePieceEncoding, ThreePieceEncoding
from paligemma_jax.processing.image import Bicubic, BilinearTruncated, ImagePreprocessing
from paligemma_jax.weights.json_file import read_json

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
    image = ImagePreprocessing(config.img.image_size, BilinearTruncated())
    return {"image": image.to_dict(), "encoding": ThreePieceEncoding.name}


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
    image = ImagePreprocessing(config.img.image_size, Bicubic())
    return {"image": image.to_dict(), "encoding": OnePieceEncoding.name}


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
