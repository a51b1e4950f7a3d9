"""Models of Kaggle, by its own client and in its cache."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paligemma_jax.errors import CheckpointError, MissingExtraError
from paligemma_jax.hub import http
from paligemma_jax.hub.catalogue import Kaggle
from paligemma_jax.hub.files import (
    INDEX,
    MASK_CODECS,
    SINGLE,
    choose_npz,
    fetch_tokenizer,
    npz_names,
    refused,
)
from paligemma_jax.hub.http import Meter, Progress, is_transient, status_of

_COMPLETE = ".complete"


def kaggle_cached(location: Kaggle) -> Path | None:
    """Path of the newest version that is whole in the cache."""
    folder = kaggle_folder(location)
    try:
        versions = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    except OSError:
        return None
    for version in sorted(versions, reverse=True):
        if location.version not in (None, version):
            continue
        directory = folder / str(version)
        names = [path.name for path in directory.iterdir()]
        if not (folder / f"{version}{_COMPLETE}").exists():  # files one by one
            done = folder / _COMPLETE / str(version)
            names = [name for name in names if (done / f"{name}{_COMPLETE}").exists()]
        path = _model(directory, names, location)
        if path is not None:
            return path
    return None


class _Absent(Exception):
    """Kaggle has no such file or model."""


def kaggle_download(location: Kaggle, progress: Progress | None) -> Path:
    """The likeliest npz, or if none is called so, the whole of what is there."""
    try:
        import kagglehub
    except ImportError as e:
        raise MissingExtraError(f"Downloading {location} from Kaggle", "hub") from e

    names: tuple[str | None, ...] = (None,)
    if _framework(location) == "jax":
        names = (*npz_names(location.variation, location.precision), None)
    path: Path | None = None
    if progress is not None:
        progress(str(location), 0, 0)
    with _quiet(progress):
        for name in names:
            with contextlib.suppress(_Absent):
                path = Path(_ask(location, kagglehub, name))
                break
    if path is None:
        absent = http.FetchError("not found", 404)
        raise refused(location, _page(location), absent, _has_credentials())
    if path.is_dir():
        there = sorted(os.listdir(path))
        found = _model(path, there, location)
        if found is None:
            raise CheckpointError(
                f"{location} at Kaggle holds {', '.join(there[:5])}, no weights that can be read. "
                "Expected an npz, or config.json and safetensors. See: paligemma models"
            )
        path = found
    if path.suffix == ".npz":  # Kaggle has the weights alone
        fetch_tokenizer(path.parent, Meter(progress or (lambda name, done, total: None)))
    return path


def _ask(location: Kaggle, kagglehub: Any, name: str | None) -> str:
    """Calls the client, which resumes what has arrived."""
    corrupted = 0

    def passes(e: Exception) -> bool:
        nonlocal corrupted
        if type(e).__name__ == "DataCorruptionError":
            corrupted += 1
            return corrupted == 1
        return is_transient(e)

    try:
        return http.with_retries(lambda: kagglehub.model_download(str(location), name), passes)
    except Exception as e:
        if status_of(e) == 404:
            raise _Absent from e
        if type(e).__name__ == "DataCorruptionError":
            e = http.FetchError("its checksum differs", damaged=True)
        elif not status_of(e) and not is_transient(e):
            raise
        raise refused(location, _page(location), e, _has_credentials()) from e


def _model(directory: Path, names: Sequence[str], location: Kaggle) -> Path | None:
    archive = choose_npz([n for n in names if n not in MASK_CODECS], location.precision)
    if archive:
        exact = npz_names(location.variation, location.precision)
        if location.precision is None or archive[0].partition(".npz")[0] + ".npz" in exact:
            return directory / archive[0]
        return None
    if "config.json" in names and (SINGLE in names or INDEX in names):
        return directory
    return None


def require_readable(location: Kaggle) -> None:
    if _framework(location) not in ("jax", "flax", "transformers", "pytorch"):
        raise CheckpointError(
            f"{location} is in the format of {_framework(location)}, which is not read. Try: "
            f"{location.handle.rsplit('/', 2)[0]}/jax/{location.variation}"
        )


def _framework(location: Kaggle) -> str:
    return location.handle.split("/")[2].lower()


@contextlib.contextmanager
def _quiet(progress: Progress | None) -> Iterator[None]:
    """The client logs nothing, and shows its bar only without `progress`; it has no callback."""
    logger = logging.getLogger("kagglehub")
    level = logger.level
    logger.setLevel(logging.WARNING)
    hidden = contextlib.redirect_stderr(io.StringIO())
    try:
        with contextlib.nullcontext() if progress is None else hidden:
            yield
    finally:
        logger.setLevel(level)


def kaggle_folder(location: Kaggle) -> Path:
    cache = os.environ.get("KAGGLEHUB_CACHE") or os.path.join("~", ".cache", "kagglehub")
    return Path(cache).expanduser() / "models" / location.handle


def _page(location: Kaggle) -> str:
    return f"https://www.kaggle.com/models/{location.handle}"


def _has_credentials() -> bool:
    names = ("KAGGLE_API_TOKEN", "KAGGLE_KEY")
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or "~/.kaggle").expanduser()
    return any(map(os.environ.get, names)) or any(
        (folder / name).exists() for name in ("kaggle.json", "access_token")
    )
