"""Which files a model needs, and what is said when a hub does not give them."""

import re
import urllib.parse
from collections.abc import Collection, Sequence
from pathlib import Path

from paligemma_jax.errors import CheckpointError
from paligemma_jax.hub import http
from paligemma_jax.hub.catalogue import STORAGE, HuggingFace, Kaggle, Location, Web, open_copy
from paligemma_jax.hub.http import Meter

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
# The tokenizer of all published checkpoints; it has been closed to people without account at times.
TOKENIZER = f"{STORAGE}/big_vision/paligemma_tokenizer.model"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_NPZ = re.compile(r"(?P<whole>.+\.npz)(?:\.part[_-]?\d+)?")
_PRECISIONS = {"bfloat16": (".b16.npz", ".bf16.npz"), "float16": (".f16.npz",)}


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
        f"{where} has no weights that can be read{holds}. Expected safetensors, big_vision's npz, "
        "or what paligemma convert writes. See: paligemma models"
    )


def choose_npz(names: Sequence[str], precision: str | None = None) -> tuple[str, ...]:
    """The npz of one precision, whole or in its parts; empty if there is none."""
    archives: dict[str, list[str]] = {}
    for name in sorted(names):
        match = _NPZ.fullmatch(name)
        if match:
            archives.setdefault(match["whole"], []).append(name)
    by_precision = {_precision(whole): parts for whole, parts in archives.items()}
    order = [precision] if precision else []
    for wanted in (*order, "bfloat16", "float16", "float32"):
        if wanted in by_precision:  # part 10 after part 9
            return tuple(sorted(by_precision[wanted], key=lambda name: (len(name), name)))
    return ()


def npz_names(stem: str, precision: str | None) -> tuple[str, ...]:
    """What the npz of a model may be called, the likeliest first."""
    if precision == "float32":
        return (f"{stem}.npz",)
    wanted = (precision,) if precision else ("bfloat16", "float16")
    return tuple(stem + ending for name in wanted for ending in _PRECISIONS[name])


def _precision(name: str) -> str:
    found = (p for p, endings in _PRECISIONS.items() if name.endswith(endings))
    return next(found, "float32")


def first_of(base: str, names: Sequence[str], directory: Path, meter: Meter) -> bool:
    """Whether one of the files is there now; a server that has none is no error."""
    for name in names:
        target = directory / name
        if not target.exists():
            try:
                http.fetch(f"{base}/{name}", target, meter)
            except http.FetchError as e:
                if e.damaged:
                    raise unreachable(Web(f"{base}/{name}"), base, e) from e
                continue  # the weights themselves will say so, or their host is another
        return True
    return False


def fetch_tokenizer(directory: Path, meter: Meter) -> None:
    """Puts the published tokenizer into `directory`, where one is to be had and none is there."""
    if not any((directory / name).exists() for name in TOKENIZERS):
        base, _, name = TOKENIZER.rpartition("/")
        first_of(base, (name,), directory, meter)


def refused(location: Location, page: str, error: Exception, credentials: bool) -> CheckpointError:
    """What to do about a hub that does not give what was asked for.

    `error` is a client's or a `FetchError`; `credentials` says whether an account was named.
    """
    kaggle = isinstance(location, Kaggle)
    hub, status = "Kaggle" if kaggle else "Hugging Face", http.status_of(error)
    headers = {name.lower(): value for name, value in getattr(error, "headers", {}).items()}
    name = location.handle if kaggle else str(location)
    # With 401 the hubs say the same of what is private, what is not there, and to wrong tokens.
    hidden = status == 401 and (kaggle or name.startswith("google/"))
    if headers.get("x-error-code") == "GatedRepo" or status == 403 or hidden:
        login = "run: hf auth login (or set HF_TOKEN to a token that may read)"
        if kaggle:
            login = "set KAGGLE_API_TOKEN (or KAGGLE_USERNAME and KAGGLE_KEY)"
        why, then = "no account was named", f"Open {page}, accept the licence, then {login}"
        if credentials:
            why = "the account that was used may not read it"
            then = f"Open {page} with that account and accept the licence, or {login}"
        copy = open_copy(location.repository) if isinstance(location, HuggingFace) else None
        without = f" Without an account, the same weights are at {copy}." if copy else ""
        return CheckpointError(f"{location} at {hub} is gated, and {why}.{without} {then}")
    if status in (401, 404):
        return CheckpointError(
            f"{location} is neither a path here nor a model at {hub} ({page}), or it is private. "
            "See: paligemma models"
        )
    return unreachable(location, urllib.parse.urlsplit(page).netloc, error)


def unreachable(location: Location, host: str, error: Exception) -> CheckpointError:
    """The server does not answer as it should, again and again, or gives another file."""
    if getattr(error, "damaged", False):
        return CheckpointError(
            f"{location} was damaged on its way, twice: {error}. Nothing of it was kept. Try "
            "again, or from another network"
        )
    return CheckpointError(
        f"{location} cannot be downloaded from {host}: {error}. What has arrived is kept. Check "
        f"the connection, then run: paligemma download {location}"
    )
