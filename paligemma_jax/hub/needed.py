"""Which files of a repository a model needs: one copy of the weights, and what they go with."""

import re
from collections.abc import Collection, Sequence

from paligemma_jax.errors import CheckpointError

INDEX, SINGLE, MANIFEST = "model.safetensors.index.json", "model.safetensors", "MANIFEST.json"
SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# In this order: the first that is there.
TOKENIZERS = ("tokenizer.model", "paligemma_tokenizer.model", "tokenizer.json")
MASK_CODECS = ("mask_codec.npz", "vae-oid.npz")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_NPZ = re.compile(r"(?P<whole>.+\.npz)(?:\.part[_-]?\d+)?")
_PRECISIONS = {
    "bfloat16": (".b16.npz", ".bf16.npz"),
    "float16": (".f16.npz",),
}


def needed_files(
    names: Collection[str], where: str, precision: str | None = None
) -> tuple[str, ...]:
    """Those of `names` to download, small ones first.

    Of several formats safetensors are taken, of several npz the one of `precision`, else the
    smallest. Raises CheckpointError where there are no weights that could be read.
    """
    if MANIFEST in names:
        ignored = (".gitattributes", ".gitignore", "README.md")
        return tuple(sorted((n for n in names if n not in ignored), key=lambda n: "/" in n))
    tokenizer = [name for name in TOKENIZERS if name in names][:1]
    codec = [name for name in MASK_CODECS if name in names][:1]
    settings = [name for name in SETTINGS if name in names]
    shards = sorted(name for name in names if _SHARD.fullmatch(name))
    if INDEX in names and shards:
        return (*settings, INDEX, *tokenizer, *codec, *shards)
    if SINGLE in names:
        return (*settings, *tokenizer, *codec, SINGLE)
    archive = choose_npz([n for n in names if "/" not in n and n not in MASK_CODECS], precision)
    if archive:
        return (*tokenizer, *codec, *archive)
    weights = (".bin", ".h5", ".pt", ".pth", ".msgpack", ".gguf", ".onnx", ".sbs", ".ckpt")
    others = sorted(name for name in names if name.endswith(weights))
    holds = f", only {', '.join(others[:3])}" if others else ""
    raise CheckpointError(
        f"{where} has no weights that can be read{holds}. Safetensors, big_vision's npz, or what "
        "paligemma convert writes fit. See the published models with: paligemma models"
    )


def choose_npz(names: Sequence[str], precision: str | None = None) -> tuple[str, ...]:
    """The npz of one precision, whole or in its parts; empty if there is none."""
    archives: dict[str, list[str]] = {}
    for name in sorted(names):
        match = _NPZ.fullmatch(name)
        if match:
            archives.setdefault(match["whole"], []).append(name)
    if not archives:
        return ()
    by_precision = {_precision(whole): whole for whole in archives}
    order = [precision] if precision else []
    for wanted in (*order, "bfloat16", "float16", "float32"):
        if wanted in by_precision:
            return tuple(_in_order(archives[by_precision[wanted]]))
    return ()


def npz_names(stem: str, precision: str | None) -> tuple[str, ...]:
    """What the npz of a model may be called, the likeliest first."""
    if precision == "float32":
        return (f"{stem}.npz",)
    wanted = (precision,) if precision else ("bfloat16", "float16")
    return tuple(stem + ending for name in wanted for ending in _PRECISIONS[name])


def _precision(name: str) -> str:
    for precision, endings in _PRECISIONS.items():
        if name.endswith(endings):
            return precision
    return "float32"


def _in_order(parts: list[str]) -> list[str]:
    """Part 10 after part 9."""
    return sorted(parts, key=lambda name: (len(name), name))
