"""From a source to files on disk, whichever hub it is.

How far a download is, for whoever wants to know.

One file over HTTP: tried again, gone on with where it stopped, checked, and whole or not there.

The clients of the hubs go on within a process at best; what a killed process had is lost to them,
and that may be gigabytes. None of them compares the content with the digest that its hub gives.

Which files of a repository a model needs: one copy of the weights, and what they go with.

What is said when a hub does not give what was asked for.

Models of Hugging Face, in the cache that its own libraries share.

The cache's layout is documented: blobs/DIGEST, snapshots/COMMIT/FILE linking there, refs/BRANCH.
The client lists files and knows tokens; the files come by `transfer`. What is in the cache is used
without a look at the hub, and without the client.

Models at any https address: an npz, or a directory as Hugging Face's libraries save it.

Models of Kaggle, by its own client and in its cache.
"""

import base64
import contextlib
import dataclasses
import email.utils
import errno
import hashlib
import http.client
import io
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

from paligemma_jax.errors import CheckpointError, MissingExtraError
from paligemma_jax.filesystem import locked, user_cache
from paligemma_jax.hub.catalogue import (
    OPEN_COPIES,
    STORAGE,
    HuggingFace,
    Kaggle,
    Published,
    Source,
    Web,
    check_address,
    find_source,
    open_copy,
)

Progress: TypeAlias = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all


class Meter:
    """Counts the bytes of several files; `total` may grow when a size becomes known."""

    def __init__(self, progress: Progress, total: int = 0):
        self._progress = progress
        self.total = total
        self.done = 0
        self._name = ""

    def start(self, name: str) -> None:
        """`name` is what comes now."""
        self._name = name
        self.add(0)

    def add(self, count: int) -> None:
        """`count` bytes more are there; less than nothing where some were thrown away."""
        self.done += count
        self._progress(self._name, self.done, max(self.total, self.done))


@contextlib.contextmanager
def shown(progress: Progress | None, title: str) -> Iterator[Progress]:
    """`progress`, or a bar of its own on standard error where a person may be watching.

    HF_HUB_DISABLE_PROGRESS_BARS=1 shows none.
    """
    if progress is not None:
        yield progress
        return
    disabled = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").lower() in ("1", "true", "on")
    if disabled or not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        yield lambda name, done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=title, unit="B", unit_scale=True, file=sys.stderr) as bar:

        def update(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            bar.set_postfix_str(name, refresh=False)

        yield update


TRIED_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
ATTEMPTS = 6  # without a single new byte
LONGEST_WAIT = 300.0  # seconds that a server may ask for
TIMEOUT = 30.0  # seconds without an answer
_CHUNK = 1 << 20
_AGENT = "paligemma-jax"
sleep = time.sleep


class Refused(Exception):
    """The server answered, and it was not the file: `status` is that of HTTP."""

    def __init__(self, url: str, status: int, reason: str, headers: Mapping[str, str]):
        super().__init__(f"{status} {reason}".strip())
        self.url, self.status, self.headers = url, status, headers


class Damaged(Exception):
    """What arrived has another digest."""

    def __init__(self, expected: str, found: str):
        super().__init__(f"{found} instead of {expected}")
        self.expected, self.found = expected, found


class Unreachable(Exception):
    """No connection, or one that breaks each time."""


@dataclasses.dataclass(frozen=True)
class Digest:
    """What a file must have: `algorithm` is "sha256", "md5", or "git" (sha1 of a git blob)."""

    algorithm: str
    value: str

    def of(self, path: Path) -> str:
        """The file's own, in hexadecimal digits."""
        if self.algorithm == "git":
            found = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        else:
            found = hashlib.new(self.algorithm)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
        return found.hexdigest()

    def check(self, path: Path) -> None:
        """Raises Damaged if the file has another one."""
        found = self.of(path)
        if found != self.value:
            raise Damaged(self.value, found)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to safe addresses only, and shows no credentials to other hosts."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        check_address(newurl)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and _origin(newurl) != _origin(req.full_url):
            request.remove_header("Authorization")
        return request


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def download(
    url: str,
    target: Path,
    meter: Meter,
    *,
    headers: Mapping[str, str] | None = None,
    digest: Digest | None = None,
    size: int | None = None,
) -> None:
    """Makes the file `target`, whole and checked; what is there of an earlier try is gone on with.

    `digest` and `size` are those known beforehand; without a digest, the one that the server tells
    is compared. `meter` counts what arrives; its total grows if `size` was not known.

    Raises Refused, Damaged (after a second try), Unreachable, and CheckpointError where the disk
    has no place.
    """
    part = target.with_name(f"{target.name}.partial")
    part.parent.mkdir(parents=True, exist_ok=True)
    meter.start(urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2]))
    for last in (False, True):
        told = _receive(url, part, meter, dict(headers or {}), size)
        try:
            expected = digest or told
            if expected is not None:
                expected.check(part)
        except Damaged:
            meter.add(-part.stat().st_size)
            _forget(part)
            if last:
                raise
            continue
        os.replace(part, target)
        _forget(part)
        return


def _receive(
    url: str, part: Path, meter: Meter, headers: dict[str, str], size: int | None
) -> Digest | None:
    """Fills `part`; returns the digest that the server tells."""
    counted = part.stat().st_size if part.exists() else 0
    meter.add(counted)
    known = size is not None
    failures, wait = 0, 1.0
    while True:
        start = part.stat().st_size if part.exists() else 0
        try:
            if known and start == size:
                part.touch()  # an empty file is never asked for
                return None
            with _open(url, part, start, headers) as response:
                if start and response.status != 206:
                    part.unlink()
                    meter.add(-start)
                    start = 0
                total = _total(response, start)
                if not known and total is not None:
                    meter.total += total
                    size, known = total, True
                _require_space(part, (size or 0) - start)
                _remember(part, response)
                digest = _digest(response)
                _copy(response, part, meter)
            length = part.stat().st_size
            if size is None or length == size:
                return digest
            if length > size:
                meter.add(-length)
                _forget(part)
            raise ConnectionError(f"{length:,} of {size:,} bytes came")
        except urllib.error.HTTPError as e:
            if e.code == 416 and part.exists():
                if e.headers.get("Content-Range") == f"bytes */{start}":
                    return _digest(e)  # all of it was there
                meter.add(-part.stat().st_size)
                _forget(part)
                why: Exception = e  # another file by now
            elif e.code in TRIED_AGAIN:
                why = e
            else:
                raise Refused(url, e.code, e.reason, dict(e.headers or {})) from e
            asked = retry_after(e.headers.get("Retry-After") if e.headers else None)
        except (OSError, http.client.HTTPException) as e:
            if isinstance(e, OSError) and e.errno in _DISK:
                raise CheckpointError(
                    f"{part} cannot be written: {e.strerror}. A disk with more space fits. Make "
                    "room, or choose another cache directory; what has arrived is kept."
                ) from e
            why, asked = e, None
        now = part.stat().st_size if part.exists() else 0
        failures = 1 if now > start else failures + 1
        wait = 1.0 if now > start else wait
        if failures >= ATTEMPTS:
            raise Unreachable(reason(why)) from why
        sleep(asked if asked is not None else wait)
        wait = min(2 * wait, 30.0)


def reason(error: Exception) -> str:
    """Why a connection failed, in words for a user."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {error.reason}"
    return str(inner) or type(inner).__name__


def retry_after(value: str | None) -> float | None:
    """Seconds that a server asks to wait, given as such or as a date; at most LONGEST_WAIT."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_WAIT)


_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES})


def _open(url: str, part: Path, start: int, headers: dict[str, str]) -> Any:
    asked = {"User-Agent": _AGENT, "Accept-Encoding": "identity", **headers}
    if start:
        asked["Range"] = f"bytes={start}-"
        validator = _validator(part)
        if validator.exists():  # otherwise the digest will tell whether it is the same file
            asked["If-Range"] = validator.read_text()
    check_address(url)
    opener = urllib.request.build_opener(_Redirects)
    return opener.open(urllib.request.Request(url, headers=asked), timeout=TIMEOUT)


def _total(response: Any, start: int) -> int | None:
    """Bytes of the whole file."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise ConnectionError("the server sent another part than it was asked for")
        return int(match[2])
    length = response.headers.get("Content-Length")
    return int(length) if length and length.isdecimal() else None


def _copy(response: Any, part: Path, meter: Meter) -> None:
    with part.open("ab") as file:
        while chunk := _read(response, file):
            file.write(chunk)
            meter.add(len(chunk))


def _read(response: Any, file: IO[bytes]) -> bytes:
    try:
        return response.read(_CHUNK)
    except http.client.IncompleteRead as e:
        return e.partial  # counted, and missed afterwards


def _digest(response: Any) -> Digest | None:
    """The digest of the whole file in the answer's headers, if there is one."""
    for part in ",".join(response.headers.get_all("x-goog-hash") or []).split(","):
        name, _, value = part.strip().partition("=")
        if name == "md5":
            return Digest("md5", base64.b64decode(value).hex())
    for header in ("X-Linked-Etag", "ETag"):
        value = (response.headers.get(header) or "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", value):
            return Digest("sha256", value)
    return None


def _validator(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _remember(part: Path, response: Any) -> None:
    """Keeps what tells this file from a later one at the same address."""
    etag = response.headers.get("ETag") or ""
    value = etag if etag.startswith('"') else response.headers.get("Last-Modified")
    if value:
        _validator(part).write_text(value)


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator(part).unlink(missing_ok=True)


def _require_space(part: Path, nbytes: int) -> None:
    require_space(part.parent, nbytes)


def require_space(directory: Path, nbytes: int) -> None:
    """Raises CheckpointError if so many bytes more have no place there."""
    place = directory
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise CheckpointError(
            f"{nbytes / 1e9:,.2f} GB are to be downloaded, but {directory} has "
            f"{free / 1e9:,.2f} GB free. A disk with more space fits. Make room, or choose "
            "another cache directory: set HF_HOME (Hugging Face), KAGGLEHUB_CACHE (Kaggle) or "
            "XDG_CACHE_HOME (other addresses)"
        )


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


def gated(source: Source, page: str, credentials: bool) -> CheckpointError:
    """The hub wants to know who asks, and that the licence was accepted."""
    if isinstance(source, HuggingFace):
        hub, login = "Hugging Face", "run: hf auth login (or set HF_TOKEN to a token that may read)"
    else:
        hub = "Kaggle"
        login = (
            "set KAGGLE_API_TOKEN (or KAGGLE_USERNAME and KAGGLE_KEY), or call: kagglehub.login()"
        )
    if credentials:
        why = "the account that was used may not read it"
        fits = "An account that accepted the licence fits"
        then = (
            f"Open {page} with that account, accept the licence, then run this again. For another "
            f"account {login}"
        )
    else:
        why = "no account was named"
        fits = "Anybody who accepts the licence may have it"
        then = f"Open {page}, accept the licence, then {login}"
    copy = open_copy(source.repository) if isinstance(source, HuggingFace) else None
    without = f". Without an account, the same weights are at {copy}" if copy else ""
    return CheckpointError(f"{source} at {hub} is gated, and {why}. {fits}{without}. {then}")


def not_found(source: Source, page: str) -> CheckpointError:
    """The hub knows no such model, or hides it."""
    hub = "Kaggle" if isinstance(source, Kaggle) else "Hugging Face"
    return CheckpointError(
        f"{source} is neither a path here nor a model at {hub}, or it is a private one. A path, a "
        f"published name such as paligemma2-3b-mix-448, or what {page} shows fits. See: paligemma "
        "models"
    )


def no_such_revision(source: HuggingFace, revisions: str) -> CheckpointError:
    """The repository is there, the branch is not."""
    return CheckpointError(
        f"{source.repository} has no revision {source.revision}. {revisions} Leave it out for main."
    )


def offline(source: Source, why: str) -> CheckpointError:
    """It is not in the cache, and must not or cannot be asked for."""
    return CheckpointError(
        f"{source} is not in the cache, and {why}. A machine that reaches the hub, or a cache that "
        f"was filled before, fits. Run there: paligemma download {source}"
    )


def unreachable(source: Source, host: str, why: object) -> CheckpointError:
    """The hub does not answer as it should, again and again."""
    return CheckpointError(
        f"{source} cannot be downloaded from {host}: {why}. What has arrived is kept, and is not "
        f"asked for again. Check the connection, then run: paligemma download {source}"
    )


def wrong_checksum(name: str, source: str, expected: str, found: str) -> CheckpointError:
    """What arrived, twice, is not what the hub says it has."""
    return CheckpointError(
        f"{name} of {source} was damaged on its way, twice: its digest is {found[:16]}..., that of "
        f"the hub {expected[:16]}.... Nothing of it was kept. Try again, or from another network"
    )


T = TypeVar("T")
_ENDPOINT = "https://huggingface.co"
_HEX = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of a repository; `digest` names its blob."""

    name: str
    size: int
    digest: Digest


def huggingface_fetch(
    source: HuggingFace, progress: Progress | None = None, refresh: bool = False
) -> Path:
    """Directory of the model's files; they are downloaded unless they are in the cache.

    `refresh` asks the hub whether there are newer ones. Raises CheckpointError, and
    MissingExtraError without huggingface_hub.
    """
    found = None if refresh else huggingface_cached(source)
    if found is not None:
        return found
    variable = next((name for name in _OFFLINE if _is_on(name)), None)
    if variable:
        found = huggingface_cached(source, tokenizer=False)
        if found is not None:
            return found
        raise offline(source, f"{variable} is set, so that it is not asked for")
    folder = _huggingface_folder(source)
    with shown(progress, str(source)) as tell:
        lock = _cache() / ".locks" / folder.name / "paligemma-jax.lock"
        with locked(lock, lambda: tell("waiting for another download", 0, 0)):
            found = None if refresh else huggingface_cached(source)
            return found or _huggingface_download(source, folder, tell)


def huggingface_cached(source: HuggingFace, tokenizer: bool = True) -> Path | None:
    """Directory of the model's files if all that are needed are in the cache.

    Without `tokenizer`, one that other programs left without a tokenizer counts too.
    """
    folder = _huggingface_folder(source)
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


def _huggingface_download(source: HuggingFace, folder: Path, progress: Progress) -> Path:
    token = _token()
    commit, files = _listing(source, token)
    blobs, snapshot = folder / "blobs", folder / "snapshots" / commit
    # Files of the same content are one blob.
    contents = {file.digest.value: file for file in files}
    missing = [file for blob, file in contents.items() if not (blobs / blob).exists()]
    parts = [blobs / f"{file.digest.value}.partial" for file in missing]
    there = sum(part.stat().st_size for part in parts if part.exists())
    require_space(folder, sum(file.size for file in missing) - there)
    meter = Meter(progress, sum(file.size for file in contents.values()))
    meter.done = meter.total - sum(file.size for file in missing)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for file in missing:
        name = urllib.parse.quote(file.name)
        url = f"{_endpoint()}/{source.repository}/resolve/{commit}/{name}"
        try:
            download(
                url,
                blobs / file.digest.value,
                meter,
                headers=headers,
                digest=file.digest,
                size=file.size,
            )
        except Refused as e:
            raise _refused(source, e.status, e.headers, e) from e
        except Damaged as e:
            raise wrong_checksum(file.name, str(source), e.expected, e.found) from e
        except Unreachable as e:
            raise unreachable(source, _host(), e) from e
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
        raise gated(source, _huggingface_page(source), token is not None) from e
    except errors.RevisionNotFoundError as e:
        raise _no_such_revision(source) from e
    except errors.HfHubHTTPError as e:
        raise _refused(source, _status(e), {}, e) from e
    except Exception as e:
        if not _is_of_network(e):
            raise
        raise unreachable(source, _host(), e) from e
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
        digest = Digest("git", str(file.blob_id))
        if lfs is not None:
            digest = Digest("sha256", str(lfs.sha256))
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
    for _ in range(ATTEMPTS - 1):
        try:
            return ask()
        except problem as e:
            if _status(e) not in TRIED_AGAIN:
                raise
            response = getattr(e, "response", None)
            asked = retry_after(response.headers.get("Retry-After") if response else None)
        except Exception as e:
            if not _is_of_network(e):
                raise
            asked = None
        sleep(asked if asked is not None else wait)
        wait *= 2
    return ask()


def _refused(source: HuggingFace, status: int, headers: Any, cause: Exception) -> CheckpointError:
    code = next((v for k, v in dict(headers).items() if k.lower() == "x-error-code"), "")
    if code == "GatedRepo" or status == 403:
        return gated(source, _huggingface_page(source), _token() is not None)
    if status == 401:
        # The hub says the same of what is private, what is not there, and to wrong tokens.
        if source.repository.startswith("google/"):
            return gated(source, _huggingface_page(source), _token() is not None)
        return not_found(source, _huggingface_page(source))
    if status == 404:
        return not_found(source, _huggingface_page(source))
    return unreachable(source, _host(), cause)


def _no_such_revision(source: HuggingFace) -> CheckpointError:
    from paligemma_jax.hub.catalogue import find_published

    entry = find_published(source.repository)
    fit = f"{', '.join(entry.revisions)} fit." if entry else "One of its branches or tags fits."
    return no_such_revision(source, fit)


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


def _huggingface_folder(source: HuggingFace) -> Path:
    return _cache() / f"models--{source.repository.replace('/', '--')}"


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or _ENDPOINT).rstrip("/")


def _host() -> str:
    return urllib.parse.urlsplit(_endpoint()).netloc


def _huggingface_page(source: HuggingFace) -> str:
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


# The tokenizer of all published checkpoints; it has been closed to people without account at times.
TOKENIZER = f"{STORAGE}/big_vision/paligemma_tokenizer.model"
_WHOLE = ".whole"  # beside a directory of which everything is there


def web_fetch(source: Web, progress: Progress | None = None) -> Path:
    """Path of the npz or directory; it is downloaded unless it was before.

    What lies at an address is taken to stay the same. A tokenizer and a mask codec beside the
    weights come with them. Raises CheckpointError.
    """
    found = web_cached(source)
    if found is not None:
        return found
    directory = _directory(source)
    with shown(progress, source.url.rpartition("/")[2] or source.url) as tell:
        lock = directory.with_name(f"{directory.name}.lock")
        with locked(lock, lambda: tell("waiting for another download", 0, 0)):
            found = web_cached(source)
            if found is not None:
                return found
            files = _fetch_npz if _is_file(source) else _fetch_directory
            files(source, directory, Meter(tell))
            (directory / _WHOLE).touch()
    found = web_cached(source)
    assert found is not None
    return found


def web_cached(source: Web) -> Path | None:
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
    digest = None if source.sha256 is None else Digest("sha256", source.sha256)
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
    source: Web, url: str, target: Path, meter: Meter, digest: Digest | None = None
) -> None:
    if target.exists():
        return
    host = urllib.parse.urlsplit(url).netloc
    try:
        download(url, target, meter, digest=digest)
    except Refused as e:
        raise CheckpointError(
            f"{url} cannot be had: the server says {e}. The address of an npz, or of a directory "
            "with config.json and safetensors, open to everybody, fits. Download it with your "
            "account by other means, and pass the path."
        ) from e
    except Damaged as e:
        raise wrong_checksum(target.name, source.url, e.expected, e.found) from e
    except Unreachable as e:
        raise unreachable(source, host, e) from e


def _optional(url: str, target: Path, meter: Meter) -> bool:
    """Whether the file is there now; a server that has none or keeps it to itself is no error."""
    if target.exists():
        return True
    try:
        download(url, target, meter)
    except Refused:
        return False
    except Damaged as e:
        raise wrong_checksum(target.name, url, e.expected, e.found) from e
    except Unreachable:
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


_COMPLETE = ".complete"
_INTERVAL = 0.5  # seconds between looks at what has come


def kaggle_fetch(source: Kaggle, progress: Progress | None = None, refresh: bool = False) -> Path:
    """Path of the npz, or directory of a model in Hugging Face's format.

    It is downloaded unless it is in the cache; `refresh` asks for the newest version. Raises
    CheckpointError, and MissingExtraError without kagglehub.
    """
    _require_readable(source)
    found = None if refresh else kaggle_cached(source)
    if found is not None:
        return found
    try:
        import kagglehub
    except ImportError as e:
        raise MissingExtraError(f"Downloading {source} from Kaggle", "hub") from e
    lock = _kaggle_folder(source) / ".paligemma-jax.lock"
    with locked(lock):
        found = None if refresh else kaggle_cached(source)
        if found is not None:
            return found
        with _quiet(source, progress):
            path = _kaggle_download(source, kagglehub)
        if path.suffix == ".npz":
            # Kaggle has the weights alone.
            fetch_tokenizer(path.parent, Meter(progress or (lambda name, done, total: None)))
        return path


def kaggle_cached(source: Kaggle) -> Path | None:
    """Path of the newest version that is whole in the cache."""
    folder = _kaggle_folder(source)
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


def _kaggle_download(source: Kaggle, kagglehub: Any) -> Path:
    """The likeliest file, or if none is called so, the whole of what is there."""
    names = npz_names(source.variation, source.precision) if _framework(source) == "jax" else ()
    for name in names:
        with contextlib.suppress(_Absent):
            return Path(_ask(source, lambda name=name: kagglehub.model_download(str(source), name)))
    try:
        directory = Path(_ask(source, lambda: kagglehub.model_download(str(source))))
    except _Absent as e:
        raise not_found(source, _kaggle_page(source)) from e
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
    for attempt in range(ATTEMPTS):
        asked = None
        try:
            return download()
        except Exception as e:
            response = getattr(e, "response", None)
            status = getattr(response, "status_code", None)
            if status == 404:
                raise _Absent from e
            if status in (401, 403):
                raise gated(source, _kaggle_page(source), _has_credentials()) from e
            if type(e).__name__ == "DataCorruptionError":
                if damaged:
                    raise CheckpointError(
                        f"{source} of Kaggle was damaged on its way, twice. Nothing of it was "
                        "kept. Try again, or from another network"
                    ) from e
                damaged = True
                continue
            transient = status in TRIED_AGAIN if status else isinstance(e, OSError)
            if not transient:
                raise
            if attempt == ATTEMPTS - 1:
                raise unreachable(source, "www.kaggle.com", e) from e
            if response is not None:
                asked = retry_after(response.headers.get("Retry-After"))
        sleep(asked if asked is not None else wait)
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
    for path in _kaggle_folder(source).rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _kaggle_folder(source: Kaggle) -> Path:
    cache = os.environ.get("KAGGLEHUB_CACHE") or os.path.join("~", ".cache", "kagglehub")
    return Path(cache).expanduser() / "models" / source.handle


def _kaggle_page(source: Kaggle) -> str:
    return f"https://www.kaggle.com/models/{source.handle}"


def _has_credentials() -> bool:
    names = ("KAGGLE_API_TOKEN", "KAGGLE_KEY")
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or "~/.kaggle").expanduser()
    return any(map(os.environ.get, names)) or any(
        (folder / name).exists() for name in ("kaggle.json", "access_token")
    )


def fetch_fetch(source: Source, progress: Progress | None = None, refresh: bool = False) -> Path:
    """Path of a model's weights, and what lies beside them, in the cache of its hub.

    What is there is used without asking; `refresh` looks for something newer at
    Hugging Face and Kaggle. Of processes that
    start together, one downloads and the others wait. Raises CheckpointError; MissingExtraError
    where the hub's client is needed and not installed.
    """
    match source:
        case HuggingFace():
            return huggingface_fetch(source, progress, refresh)
        case Kaggle():
            return kaggle_fetch(source, progress, refresh)
        case Web():
            return web_fetch(source, progress)


def fetch_cached(source: Source) -> Path | None:
    """The same path if nothing has to be downloaded for it; asks no hub."""
    match source:
        case HuggingFace():
            return huggingface_cached(source)
        case Kaggle():
            return kaggle_cached(source)
        case Web():
            return web_cached(source)


def cached_sources(entry: Published) -> list[Source]:
    """Where of the places that have a published model it has been downloaded from."""
    places: list[Source] = []
    for repository in (entry.repository, entry.jax_repository):
        places += [HuggingFace(repository, revision) for revision in entry.revisions]
    if entry.kaggle:
        places.append(Kaggle(entry.kaggle))
    if entry.name in OPEN_COPIES:
        copy = find_source(OPEN_COPIES[entry.name])
        places += [copy] if copy else []
    return [source for source in places if fetch_cached(source) is not None]
