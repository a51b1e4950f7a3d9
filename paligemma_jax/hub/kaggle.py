"""Models of Kaggle, by its own client and in its cache."""

import contextlib
import io
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from paligemma_jax.errors import CheckpointError, MissingExtraError
from paligemma_jax.hub import http
from paligemma_jax.hub.catalogue import Kaggle
from paligemma_jax.hub.files import INDEX, SINGLE, choose_npz, download_error, npz_names
from paligemma_jax.hub.http import Progress


def folder(location: Kaggle) -> Path:
    """Directory of all versions in the client's cache."""
    cache = os.environ.get("KAGGLEHUB_CACHE") or os.path.join("~", ".cache", "kagglehub")
    return Path(cache).expanduser() / "models" / location.handle


def cached(location: Kaggle) -> Path | None:
    """Path of the newest version that is whole in the cache."""
    place = folder(location)
    paths = place.iterdir() if place.exists() else ()
    versions = {int(path.name) for path in paths if path.name.isdecimal()}
    if location.version is not None:
        versions &= {location.version}
    for version in sorted(versions, reverse=True):
        names = set(os.listdir(place / str(version)))
        if not (place / f"{version}.complete").exists():  # files one by one
            done = place / ".complete" / str(version)
            names = {name for name in names if (done / f"{name}.complete").exists()}
        if path := _model_path(place / str(version), names, location):
            return path
    return None


def _model_path(directory: Path, names: Collection[str], location: Kaggle) -> Path | None:
    if archive := choose_npz(names, location.precision):
        exact = npz_names(location.handle.rsplit("/", 1)[1], location.precision)
        is_it = location.precision is None or archive[0].partition(".npz")[0] + ".npz" in exact
        return directory / archive[0] if is_it else None
    is_directory = "config.json" in names and (SINGLE in names or INDEX in names)
    return directory if is_directory else None


def _ask(client: Any, location: Kaggle, names: Sequence[str | None]) -> Path:
    """What the client returns for the first of the files that is there; None is all of them."""
    corrupted: list[Exception] = []

    def passes(e: Exception) -> bool:
        if type(e).__name__ != "DataCorruptionError":
            return http.is_transient(e)
        corrupted.append(e)
        return len(corrupted) == 1

    for name in names:
        try:
            return Path(
                http.with_retries(lambda: client.model_download(str(location), name), passes)  # noqa: B023
            )
        except Exception as e:
            if http.status_of(e) == 404 and name != names[-1]:
                continue
            if len(corrupted) > 1:
                e = http.FetchError("its checksum differs", 0, {}, damaged=True)
            raise download_error(location, e, _has_account()) from e
    raise AssertionError("no names")


def _has_account() -> bool:
    place = Path(os.environ.get("KAGGLE_CONFIG_DIR") or "~/.kaggle").expanduser()
    files = (place / name for name in ("kaggle.json", "access_token"))
    return any(map(os.environ.get, ("KAGGLE_API_TOKEN", "KAGGLE_KEY"))) or any(
        path.exists() for path in files
    )


def download(location: Kaggle, progress: Progress | None) -> Path:
    """The most probable npz, or if none is called so, the whole of what is there.

    The client resumes what has arrived. It has no callback: `progress` only hides its own bar.
    """
    family, framework, variation = location.handle.rsplit("/", 2)
    if framework.lower() not in ("jax", "flax", "transformers", "pytorch"):
        raise CheckpointError(
            f"{location} is in the format of {framework}, which is not read. Try: "
            f"{family}/jax/{variation}"
        )
    try:
        import kagglehub
    except ImportError as e:
        raise MissingExtraError(f"Downloading {location} from Kaggle", "hub") from e

    names = npz_names(variation, location.precision) if framework.lower() == "jax" else ()
    logger = logging.getLogger("kagglehub")
    level = logger.level
    logger.setLevel(logging.WARNING)
    hidden = contextlib.redirect_stderr(io.StringIO())
    if progress is not None:
        progress(str(location), 0, 0)
    try:
        with contextlib.nullcontext() if progress is None else hidden:
            path = _ask(kagglehub, location, (*names, None))
    finally:
        logger.setLevel(level)
    if path.is_file():
        return path
    there = sorted(os.listdir(path))
    found = _model_path(path, there, location)
    if found is None:
        raise CheckpointError(
            f"{location} at Kaggle holds {', '.join(there[:5])}, no weights that can be read. "
            "Expected an npz, or config.json and safetensors. See: paligemma models"
        )
    return found
