"""Models of Hugging Face, in the cache that its own libraries share.

The cache's layout is documented: blobs/DIGEST, snapshots/COMMIT/FILE linking there, refs/BRANCH.
The client lists files and knows tokens; the files come by `transfer`. What is in the cache is used
without a look at the hub, and without the client.
"""

import dataclasses
import json
import os
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from paligemma_jax.errors import CheckpointError, MissingExtraError
from paligemma_jax.hub import problems, transfer
from paligemma_jax.hub.locks import locked
from paligemma_jax.hub.meter import Meter, Progress, shown
from paligemma_jax.hub.needed import (
    INDEX,
    MANIFEST,
    MASK_CODECS,
    SINGLE,
    TOKENIZERS,
    choose_npz,
    needed_files,
)
from paligemma_jax.hub.sources import HuggingFace

T = TypeVar("T")
_ENDPOINT = "https://huggingface.co"
_HEX = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of a repository; `digest` names its blob."""

    name: str
    size: int
    digest: transfer.Digest


def fetch(source: HuggingFace, progress: Progress | None = None, refresh: bool = False) -> Path:
    """Directory of the model's files; they are downloaded unless they are in the cache.

    `refresh` asks the hub whether there are newer ones. Raises CheckpointError, and
    MissingExtraError without huggingface_hub.
    """
    found = None if refresh else cached(source)
    if found is not None:
        return found
    variable = next((name for name in _OFFLINE if _is_on(name)), None)
    if variable:
        found = cached(source, tokenizer=False)
        if found is not None:
            return found
        raise problems.offline(source, f"{variable} is set, so that it is not asked for")
    folder = _folder(source)
    with shown(progress, str(source)) as tell:
        lock = _cache() / ".locks" / folder.name / "paligemma-jax.lock"
        with locked(lock, lambda: tell("waiting for another download", 0, 0)):
            found = None if refresh else cached(source)
            return found or _download(source, folder, tell)


def cached(source: HuggingFace, tokenizer: bool = True) -> Path | None:
    """Directory of the model's files if all that are needed are in the cache.

    Without `tokenizer`, one that other programs left without a tokenizer counts too.
    """
    folder = _folder(source)
    reference = folder / "refs" / source.revision
    try:
        commit = reference.read_text().strip()
    except OSError:
        commit = source.revision
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and _is_whole(snapshot, tokenizer) else None


def _is_whole(snapshot: Path, tokenizer: bool) -> bool:
    try:
        names = {path.name for path in snapshot.iterdir() if path.exists()}
        if MANIFEST in names or choose_npz([n for n in names if n not in MASK_CODECS]):
            return True
        if "config.json" not in names or (tokenizer and not names.intersection(TOKENIZERS)):
            return False
        if SINGLE in names:
            return True
        return set(json.loads((snapshot / INDEX).read_bytes())["weight_map"].values()) <= names
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _download(source: HuggingFace, folder: Path, progress: Progress) -> Path:
    token = _token()
    commit, files = _listing(source, token)
    blobs, snapshot = folder / "blobs", folder / "snapshots" / commit
    # Files of the same content are one blob.
    contents = {file.digest.value: file for file in files}
    missing = [file for blob, file in contents.items() if not (blobs / blob).exists()]
    parts = [blobs / f"{file.digest.value}.partial" for file in missing]
    there = sum(part.stat().st_size for part in parts if part.exists())
    transfer.require_space(folder, sum(file.size for file in missing) - there)
    meter = Meter(progress, sum(file.size for file in contents.values()))
    meter.done = meter.total - sum(file.size for file in missing)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for file in missing:
        name = urllib.parse.quote(file.name)
        url = f"{_endpoint()}/{source.repository}/resolve/{commit}/{name}"
        try:
            transfer.download(
                url,
                blobs / file.digest.value,
                meter,
                headers=headers,
                digest=file.digest,
                size=file.size,
            )
        except transfer.Refused as e:
            raise _refused(source, e.status, e.headers, e) from e
        except transfer.Damaged as e:
            raise problems.wrong_checksum(file.name, str(source), e.expected, e.found) from e
        except transfer.Unreachable as e:
            raise problems.unreachable(source, _host(), e) from e
    for file in reversed(files):  # weights first: what says that all is there comes last
        _link(snapshot / file.name, blobs / file.digest.value)
    if commit != source.revision:  # last: what a branch names is whole
        _write(folder / "refs" / source.revision, commit)
    return snapshot


def _listing(source: HuggingFace, token: str | None) -> tuple[str, list[_File]]:
    """The commit of a revision, and the files in it that a model needs."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as e:
        raise MissingExtraError(f"Downloading {source} from Hugging Face", "hub") from e

    api = huggingface_hub.HfApi(endpoint=_endpoint(), token=token or False)

    def ask() -> Any:
        return api.model_info(source.repository, revision=source.revision, files_metadata=True)

    try:
        info = _patiently(ask, errors.HfHubHTTPError)
    except errors.GatedRepoError as e:
        raise problems.gated(source, _page(source), token is not None) from e
    except errors.RevisionNotFoundError as e:
        raise _no_such_revision(source) from e
    except errors.HfHubHTTPError as e:
        raise _refused(source, _status(e), {}, e) from e
    except Exception as e:
        if not _is_of_network(e):
            raise
        raise problems.unreachable(source, _host(), e) from e
    listed = {file.rfilename: file for file in info.siblings or []}
    files = []
    for name in needed_files(listed, f"{source} at Hugging Face"):
        if os.path.isabs(name) or ".." in Path(name).parts or "\\" in name:
            raise CheckpointError(
                f"{source} lists a file {name!r}, which would lie outside of its directory. Plain "
                "names fit. Take another repository."
            )
        file = listed[name]
        lfs = file.lfs
        digest = transfer.Digest("git", str(file.blob_id))
        if lfs is not None:
            digest = transfer.Digest("sha256", str(lfs.sha256))
        if not _HEX.fullmatch(digest.value) or not _HEX.fullmatch(str(info.sha)):
            raise CheckpointError(
                f"{_host()} lists {source} without digests. A hub that gives the sha256 of its "
                "files fits. Set HF_ENDPOINT to another one, or leave it unset."
            )
        files.append(_File(name, (file.size if lfs is None else lfs.size) or 0, digest))
    return info.sha, files


def _patiently(ask: Callable[[], T], problem: type[Exception]) -> T:
    """Asks again where the hub is overloaded or the connection breaks."""
    wait = 1.0
    for _ in range(transfer.ATTEMPTS - 1):
        try:
            return ask()
        except problem as e:
            if _status(e) not in transfer.TRIED_AGAIN:
                raise
            response = getattr(e, "response", None)
            asked = transfer.retry_after(response.headers.get("Retry-After") if response else None)
        except Exception as e:
            if not _is_of_network(e):
                raise
            asked = None
        transfer.sleep(asked if asked is not None else wait)
        wait *= 2
    return ask()


def _refused(source: HuggingFace, status: int, headers: Any, cause: Exception) -> CheckpointError:
    code = next((v for k, v in dict(headers).items() if k.lower() == "x-error-code"), "")
    if code == "GatedRepo" or status == 403:
        return problems.gated(source, _page(source), _token() is not None)
    if status == 401:
        # The hub says the same of what is private, what is not there, and to wrong tokens.
        if source.repository.startswith("google/"):
            return problems.gated(source, _page(source), _token() is not None)
        return problems.not_found(source, _page(source))
    if status == 404:
        return problems.not_found(source, _page(source))
    return problems.unreachable(source, _host(), cause)


def _no_such_revision(source: HuggingFace) -> CheckpointError:
    from paligemma_jax.hub.catalogue import find_published

    entry = find_published(source.repository)
    fit = f"{', '.join(entry.revisions)} fit." if entry else "One of its branches or tags fits."
    return problems.no_such_revision(source, fit)


def _status(error: Exception) -> int:
    return getattr(getattr(error, "response", None), "status_code", 0)


def _is_of_network(error: Exception) -> bool:
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library in ("httpx", "httpx2", "requests")


def _link(path: Path, blob: Path) -> None:
    """Makes `path` stand for `blob`, by a relative link where the system has links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        os.link(blob, path)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _cache() -> Path:
    """As the client finds it; read from the environment each time."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def _folder(source: HuggingFace) -> Path:
    return _cache() / f"models--{source.repository.replace('/', '--')}"


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or _ENDPOINT).rstrip("/")


def _host() -> str:
    return urllib.parse.urlsplit(_endpoint()).netloc


def _page(source: HuggingFace) -> str:
    return f"{_endpoint()}/{source.repository}"


def _token() -> str | None:
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    return token.strip() if token else login_token()


def login_token() -> str | None:
    """The token that `hf auth login` left."""
    try:
        import huggingface_hub
    except ImportError:
        return None
    return huggingface_hub.get_token()


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")
