"""Models at any https address: an npz, or a directory as Hugging Face's libraries save it."""

import hashlib
import json
import urllib.parse
from pathlib import Path

from paligemma_jax.errors import CheckpointError
from paligemma_jax.hub import problems, transfer
from paligemma_jax.hub.locks import locked
from paligemma_jax.hub.meter import Meter, Progress, shown
from paligemma_jax.hub.needed import INDEX, MASK_CODECS, SETTINGS, SINGLE, TOKENIZERS
from paligemma_jax.hub.sources import OPEN_COPIES, STORAGE, Web, find_source
from paligemma_jax.user_cache import user_cache

# The tokenizer of all published checkpoints; it has been closed to people without account at times.
TOKENIZER = f"{STORAGE}/big_vision/paligemma_tokenizer.model"
_WHOLE = ".whole"  # beside a directory of which everything is there


def fetch(source: Web, progress: Progress | None = None) -> Path:
    """Path of the npz or directory; it is downloaded unless it was before.

    What lies at an address is taken to stay the same. A tokenizer and a mask codec beside the
    weights come with them. Raises CheckpointError.
    """
    found = cached(source)
    if found is not None:
        return found
    directory = _directory(source)
    with shown(progress, source.url.rpartition("/")[2] or source.url) as tell:
        lock = directory.with_name(f"{directory.name}.lock")
        with locked(lock, lambda: tell("waiting for another download", 0, 0)):
            found = cached(source)
            if found is not None:
                return found
            files = _fetch_npz if _is_file(source) else _fetch_directory
            files(source, directory, Meter(tell))
            (directory / _WHOLE).touch()
    found = cached(source)
    assert found is not None
    return found


def cached(source: Web) -> Path | None:
    """Path of the npz or directory if it was downloaded before."""
    directory = _directory(source)
    if not (directory / _WHOLE).exists():
        return None
    path = directory / _name(source) if _is_file(source) else directory
    return path if path.exists() else None


def fetch_tokenizer(directory: Path, meter: Meter) -> None:
    """Puts the published tokenizer into `directory`, where one is to be had and none is there."""
    if not any((directory / name).exists() for name in TOKENIZERS):
        _optional(TOKENIZER, directory / "paligemma_tokenizer.model", meter)


def _fetch_npz(source: Web, directory: Path, meter: Meter) -> None:
    beside = source.url.rpartition("/")[0]
    for name in ("paligemma_tokenizer.model", "tokenizer.model"):
        if _optional(f"{beside}/{name}", directory / name, meter):
            break
    for name in MASK_CODECS:
        if _optional(f"{beside}/{name}", directory / name, meter):
            break
    if source.url.startswith(f"{STORAGE}/"):
        fetch_tokenizer(directory, meter)
    digest = None if source.sha256 is None else transfer.Digest("sha256", source.sha256)
    _required(source, source.url, directory / _name(source), meter, digest)


def _fetch_directory(source: Web, directory: Path, meter: Meter) -> None:
    base = source.url.rstrip("/")
    _required(source, f"{base}/config.json", directory / "config.json", meter)
    for name in SETTINGS[1:]:
        _optional(f"{base}/{name}", directory / name, meter)
    for name in TOKENIZERS:
        if _optional(f"{base}/{name}", directory / name, meter):
            break
    if not _optional(f"{base}/{INDEX}", directory / INDEX, meter):
        _required(source, f"{base}/{SINGLE}", directory / SINGLE, meter)
        return
    for shard in _shards(source, directory / INDEX):
        _required(source, f"{base}/{shard}", directory / shard, meter)


def _shards(source: Web, index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        plain = all(name.endswith(".safetensors") and Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        names, plain = [], False
    if plain and names and not any("\\" in name for name in names):
        return names
    index.unlink()
    raise CheckpointError(
        f"{source.url}/{INDEX} is no index of shards, or names files outside of the directory. "
        "One that names .safetensors files beside it fits. Save the model again with: "
        "model.save_pretrained(directory)"
    )


def _required(
    source: Web, url: str, target: Path, meter: Meter, digest: transfer.Digest | None = None
) -> None:
    if target.exists():
        return
    host = urllib.parse.urlsplit(url).netloc
    try:
        transfer.download(url, target, meter, digest=digest)
    except transfer.Refused as e:
        raise CheckpointError(
            f"{url} cannot be had: the server says {e}. The address of an npz, or of a directory "
            "with config.json and safetensors, open to everybody, fits. Download it with your "
            "account by other means, and pass the path."
        ) from e
    except transfer.Damaged as e:
        raise problems.wrong_checksum(target.name, source.url, e.expected, e.found) from e
    except transfer.Unreachable as e:
        raise problems.unreachable(source, host, e) from e


def _optional(url: str, target: Path, meter: Meter) -> bool:
    """Whether the file is there now; a server that has none or keeps it to itself is no error."""
    if target.exists():
        return True
    try:
        transfer.download(url, target, meter)
    except transfer.Refused:
        return False
    except transfer.Damaged as e:
        raise problems.wrong_checksum(target.name, url, e.expected, e.found) from e
    except transfer.Unreachable:
        return False  # the weights themselves will say so, or their host is another
    return True


def _is_file(source: Web) -> bool:
    path = urllib.parse.urlsplit(source.url).path
    if path.endswith(".npz"):
        return True
    if path.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".gguf", ".safetensors")):
        raise CheckpointError(
            f"{source.url} is not the address of a whole model. That of an npz, or of the "
            "directory with config.json and safetensors, fits. Try: "
            f"{source.url.rpartition('/')[0]}/"
        )
    return False


def _name(source: Web) -> str:
    """What the file is called here: without anything that could lead to another directory."""
    name = urllib.parse.unquote(urllib.parse.urlsplit(source.url).path.rpartition("/")[2])
    return _plain(name).lstrip(".")


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _directory(source: Web) -> Path:
    """A directory of its own for each address; a published model's is called by its name."""
    digest = hashlib.sha256(f"{source.url}#{source.sha256 or ''}".encode()).hexdigest()[:16]
    host = urllib.parse.urlsplit(source.url).hostname or ""
    last = Path(_name(source) or "model").stem
    for name, address in OPEN_COPIES.items():
        known = find_source(address)
        last = name if isinstance(known, Web) and known.url == source.url else last
    return user_cache() / "downloads" / f"{_plain(f'{host}-{last}')}-{digest}"
