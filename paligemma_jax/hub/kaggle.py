"""Models of Kaggle, by its own client and in its cache."""

import contextlib
import io
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paligemma_jax.errors import CheckpointError, MissingExtraError
from paligemma_jax.hub import problems, transfer
from paligemma_jax.hub.locks import locked
from paligemma_jax.hub.meter import Meter, Progress
from paligemma_jax.hub.needed import INDEX, MASK_CODECS, SINGLE, choose_npz, npz_names
from paligemma_jax.hub.sources import Kaggle
from paligemma_jax.hub.web import fetch_tokenizer

_COMPLETE = ".complete"
_INTERVAL = 0.5  # seconds between looks at what has come


def fetch(source: Kaggle, progress: Progress | None = None, refresh: bool = False) -> Path:
    """Path of the npz, or directory of a model in Hugging Face's format.

    It is downloaded unless it is in the cache; `refresh` asks for the newest version. Raises
    CheckpointError, and MissingExtraError without kagglehub.
    """
    _require_readable(source)
    found = None if refresh else cached(source)
    if found is not None:
        return found
    try:
        import kagglehub
    except ImportError as e:
        raise MissingExtraError(f"Downloading {source} from Kaggle", "hub") from e
    lock = _folder(source) / ".paligemma-jax.lock"
    with locked(lock):
        found = None if refresh else cached(source)
        if found is not None:
            return found
        with _quiet(source, progress):
            path = _download(source, kagglehub)
        if path.suffix == ".npz":
            # Kaggle has the weights alone.
            fetch_tokenizer(path.parent, Meter(progress or (lambda name, done, total: None)))
        return path


def cached(source: Kaggle) -> Path | None:
    """Path of the newest version that is whole in the cache."""
    folder = _folder(source)
    try:
        versions = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    except OSError:
        return None
    wanted = [v for v in sorted(versions, reverse=True) if source.version in (None, v)]
    for version in wanted:
        directory = folder / str(version)
        names = [path.name for path in directory.iterdir()]
        if not (folder / f"{version}{_COMPLETE}").exists():  # files one by one
            done = folder / _COMPLETE / str(version)
            names = [name for name in names if (done / f"{name}{_COMPLETE}").exists()]
        path = _model(directory, names, source)
        if path is not None:
            return path
    return None


def _download(source: Kaggle, kagglehub: Any) -> Path:
    """The likeliest file, or if none is called so, the whole of what is there."""
    names = npz_names(source.variation, source.precision) if _framework(source) == "jax" else ()
    for name in names:
        with contextlib.suppress(_Absent):
            return Path(_ask(source, lambda name=name: kagglehub.model_download(str(source), name)))
    try:
        directory = Path(_ask(source, lambda: kagglehub.model_download(str(source))))
    except _Absent as e:
        raise problems.not_found(source, _page(source)) from e
    path = _model(directory, os.listdir(directory), source)
    if path is None:
        raise CheckpointError(
            f"{source} at Kaggle holds {', '.join(sorted(os.listdir(directory))[:5])}, no weights "
            "that can be read. An npz, or config.json and safetensors fit. See: paligemma models"
        )
    return path


class _Absent(Exception):
    """Kaggle has no such file or model."""


def _ask(source: Kaggle, download: Any) -> str:
    """Calls the client, again where Kaggle is overloaded; what has arrived is gone on with."""
    wait = 1.0
    damaged = False
    for attempt in range(transfer.ATTEMPTS):
        asked = None
        try:
            return download()
        except Exception as e:
            response = getattr(e, "response", None)
            status = getattr(response, "status_code", None)
            if status == 404:
                raise _Absent from e
            if status in (401, 403):
                raise problems.gated(source, _page(source), _has_credentials()) from e
            if type(e).__name__ == "DataCorruptionError":
                if damaged:
                    raise CheckpointError(
                        f"{source} of Kaggle was damaged on its way, twice. Nothing of it was "
                        "kept. Try again, or from another network"
                    ) from e
                damaged = True
                continue
            transient = status in transfer.TRIED_AGAIN if status else isinstance(e, OSError)
            if not transient:
                raise
            if attempt == transfer.ATTEMPTS - 1:
                raise problems.unreachable(source, "www.kaggle.com", e) from e
            if response is not None:
                asked = transfer.retry_after(response.headers.get("Retry-After"))
        transfer.sleep(asked if asked is not None else wait)
        wait *= 2
    raise AssertionError("unreachable")


def _model(directory: Path, names: list[str], source: Kaggle) -> Path | None:
    archive = choose_npz([n for n in names if n not in MASK_CODECS], source.precision)
    if archive:
        exact = npz_names(source.variation, source.precision)
        if source.precision is None or archive[0].partition(".npz")[0] + ".npz" in exact:
            return directory / archive[0]
        return None
    if "config.json" in names and (SINGLE in names or INDEX in names):
        return directory
    return None


def _require_readable(source: Kaggle) -> None:
    if _framework(source) in ("jax", "flax", "transformers", "pytorch"):
        return
    raise CheckpointError(
        f"{source} is in the format of {_framework(source)}, which is not read. The same weights "
        f"for jax fit. Try: {source.handle.rsplit('/', 2)[0]}/jax/{source.variation}"
    )


def _framework(source: Kaggle) -> str:
    return source.handle.split("/")[2].lower()


@contextlib.contextmanager
def _quiet(source: Kaggle, progress: Progress | None) -> Iterator[None]:
    """The client says nothing on standard output, and shows its bar only without `progress`.

    It has no callback: `progress` is told how much has come, of nobody knows what.
    """
    logger = logging.getLogger("kagglehub")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        if progress is None:
            yield
            return
        over = threading.Event()
        watch = threading.Thread(target=_watch, args=(source, progress, over), daemon=True)
        watch.start()
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            over.set()
            watch.join()
    finally:
        logger.setLevel(level)


def _watch(source: Kaggle, progress: Progress, over: threading.Event) -> None:
    before = _size(source)
    while not over.wait(_INTERVAL):
        come = max(_size(source) - before, 0)
        progress(str(source), come, come)


def _size(source: Kaggle) -> int:
    total = 0
    for path in _folder(source).rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _folder(source: Kaggle) -> Path:
    cache = os.environ.get("KAGGLEHUB_CACHE") or os.path.join("~", ".cache", "kagglehub")
    return Path(cache).expanduser() / "models" / source.handle


def _page(source: Kaggle) -> str:
    return f"https://www.kaggle.com/models/{source.handle}"


def _has_credentials() -> bool:
    names = ("KAGGLE_API_TOKEN", "KAGGLE_KEY")
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or "~/.kaggle").expanduser()
    return any(map(os.environ.get, names)) or any(
        (folder / name).exists() for name in ("kaggle.json", "access_token")
    )
