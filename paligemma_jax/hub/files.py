"""Which files a model needs, and what is said when a hub does not give them."""

import re
import urllib.parse
from collections.abc import Collection

from paligemma_jax.errors import CheckpointError
from paligemma_jax.hub import http
from paligemma_jax.hub.catalogue import OPEN_COPIES, Kaggle, Location, Web, find_model

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
_PRECISIONS = {"bfloat16": (".b16.npz", ".bf16.npz"), "float16": (".f16.npz",)}


def needed_files(names: Collection[str], where: str) -> tuple[str, ...]:
    """Those of `names` to download, small ones first.

    Of several formats safetensors are taken, of several npz the smallest. Raises CheckpointError
    where there are no weights that could be read.
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
    if archive := choose_npz(names):
        return (*tokenizer, *codec, *archive)
    weights = (".bin", ".h5", ".pt", ".pth", ".msgpack", ".gguf", ".onnx", ".sbs", ".ckpt")
    others = sorted(name for name in names if name.endswith(weights))
    holds = f", only {', '.join(others[:3])}" if others else ""
    raise CheckpointError(
        f"{where} has no weights that can be read{holds}. Expected safetensors, big_vision's npz, "
        "or what paligemma convert writes. See: paligemma models"
    )


def choose_npz(names: Collection[str], precision: str | None = None) -> tuple[str, ...]:
    """The npz of one precision, else the smallest, whole or in its parts; empty without any."""
    archives: dict[str, list[str]] = {}
    for name in sorted(names):
        if (match := _NPZ.fullmatch(name)) and name not in MASK_CODECS and "/" not in name:
            archives.setdefault(match["whole"], []).append(name)
    for wanted in (precision, "bfloat16", "float16", "float32"):
        for whole, parts in archives.items():
            found = (p for p, endings in _PRECISIONS.items() if whole.endswith(endings))
            if next(found, "float32") == wanted:  # part 10 comes after part 9
                return tuple(sorted(parts, key=lambda name: (len(name), name)))
    return ()


def npz_names(stem: str, precision: str | None) -> tuple[str, ...]:
    """What the npz of a model may be called, the most probable first."""
    if precision == "float32":
        return (f"{stem}.npz",)
    wanted = (precision,) if precision else ("bfloat16", "float16")
    return tuple(stem + ending for name in wanted for ending in _PRECISIONS[name])


def download_error(location: Location, error: Exception, account: bool = False) -> Exception:
    """What to do about a hub that does not give what was asked for.

    `error` is a client's or a `FetchError`, anything else is returned as it is; `account` says
    whether one was named.
    """
    status = http.status_of(error)
    if not (status or isinstance(error, OSError) or http.is_transient(error)):
        return error
    if getattr(error, "damaged", False):
        return CheckpointError(
            f"{location} was damaged on its way, twice: {error}. Nothing of it was kept. Try "
            "again, or from another network"
        )
    if status and isinstance(location, Web):
        return CheckpointError(
            f"{location} cannot be downloaded: the server says {error}. Expected the open address "
            "of an npz, or of a directory with config.json and safetensors. Download it with your "
            "account by other means, and pass the path."
        )
    page = location.url if isinstance(location, Web) else location.page
    kaggle = isinstance(location, Kaggle)
    hub = "Kaggle" if kaggle else "Hugging Face"
    # With 401 the hubs say the same of what is private, what is not there, and to wrong tokens.
    hidden = status == 401 and (kaggle or str(location).startswith("google/"))
    if http.headers_of(error).get("x-error-code") == "GatedRepo" or status == 403 or hidden:
        login = "run: hf auth login (or set HF_TOKEN to a token that may read)"
        if kaggle:
            login = "set KAGGLE_API_TOKEN (or KAGGLE_USERNAME and KAGGLE_KEY)"
        why, then = "no account was named", f"Open {page}, accept the licence, then {login}"
        if account:
            why = "the account that was used may not read it"
            then = f"Open {page} with that account and accept the licence, or {login}"
        model = None if kaggle else find_model(str(location).partition("@")[0])
        copy = OPEN_COPIES.get(model.name) if model else None
        without = f" Without an account, the same weights are at {copy}." if copy else ""
        return CheckpointError(f"{location} at {hub} is gated, and {why}.{without} {then}")
    if status in (401, 404):
        return CheckpointError(
            f"{location} is neither a path here nor a model at {hub} ({page}), or it is private. "
            "See: paligemma models"
        )
    return CheckpointError(
        f"{location} cannot be downloaded from {urllib.parse.urlsplit(page).netloc}: {error}. What "
        f"has arrived is kept. Check the connection, then run: paligemma download {location}"
    )
