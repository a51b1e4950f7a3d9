"""One file over HTTP: tried again, resumed where it stopped, checked, and whole or not there.

huggingface_hub itself deletes a partial file when a download fails, which may be gigabytes, and
compares no content with the checksum that its hub gives.
"""

import base64
import dataclasses
import errno
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from paligemma_jax.errors import CheckpointError
from paligemma_jax.hub.catalogue import check_address

T = TypeVar("T")
Progress: TypeAlias = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses that may pass
ATTEMPTS = 6  # without a single new byte
LONGEST_WAIT = 300.0  # seconds that a server may ask for
TIMEOUT = 30.0  # seconds without an answer
_CHUNK = 1 << 20
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES})
sleep = time.sleep


class FetchError(OSError):
    """A file that did not come.

    Attributes:
      status: of HTTP, where the server answered with something else; 0 without an answer.
      headers: of the answer.
      damaged: whether what arrived, twice, has another checksum.
    """

    def __init__(self, reason: str, status: int, headers: Mapping[str, str], damaged: bool = False):
        super().__init__(reason)
        self.status, self.headers, self.damaged = status, headers, damaged


@dataclasses.dataclass
class Meter:
    """Counts the bytes of several files; `total` may grow when a size becomes known."""

    progress: Progress
    total: int = 0
    done: int = 0
    name: str = ""  # of what comes now

    def add(self, count: int) -> None:
        """`count` more bytes are there; a negative number where some were thrown away."""
        self.done += count
        self.progress(self.name, self.done, max(self.total, self.done))


@dataclasses.dataclass(frozen=True)
class Checksum:
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


def fetch(
    url: str,
    target: Path,
    meter: Meter,
    headers: Mapping[str, str] | None = None,
    checksum: Checksum | None = None,
    size: int | None = None,
) -> None:
    """Makes the file `target`, whole and checked; an earlier try is resumed.

    `checksum` and `size` are those known beforehand; without a checksum, the one that the server
    gives is compared. `meter` counts what arrives; its total grows if `size` was not known.

    Raises FetchError, and CheckpointError where the disk is full or cannot be written.
    """
    part = target.with_name(f"{target.name}.partial")
    part.parent.mkdir(parents=True, exist_ok=True)
    meter.name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
    meter.add(0)
    found = expected = None
    for _ in range(2):
        try:
            given = _receive(url, part, meter, dict(headers or {}), size)
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) in _DISK:
                raise CheckpointError(
                    f"{part} cannot be written: {e}. Make room, or choose another cache "
                    "directory; what has arrived is kept."
                ) from e
            status = status_of(e)
            reason = str(getattr(e, "reason", e)) or type(e).__name__
            reason = f"{meter.name}: {f'{status} ' if status else ''}{reason}"
            raise FetchError(reason, status, headers_of(e)) from e
        expected = checksum or given
        found = expected and expected.of(part)
        if expected is None or found == expected.value:
            os.replace(part, target)
            _validator(part).unlink(missing_ok=True)
            return
        _discard(part, meter)
    assert expected is not None
    reason = f"the checksum of {meter.name} is {found}, not {expected.value}"
    raise FetchError(reason, 0, {}, damaged=True)


def _receive(
    url: str, part: Path, meter: Meter, headers: dict[str, str], size: int | None
) -> Checksum | None:
    """Fills `part`; returns the checksum that the server gives."""

    def resume() -> Checksum | None:
        nonlocal size
        start = _length(part)
        if start == size:
            part.touch()  # an empty file is never asked for
            return None
        try:
            response = _open(url, part, start, headers)
        except urllib.error.HTTPError as e:
            if e.code != 416 or not part.exists():
                raise
            if e.headers.get("Content-Range") == f"bytes */{start}":
                return _given_checksum(e)  # all of it was there
            _discard(part, meter)
            raise ConnectionError("the file has changed") from e
        with response:
            if start and response.status != 206:
                part.unlink()
                meter.add(-start)
                start = 0
            total = _total(response, start)
            if size is None and total is not None:
                meter.total += total
                size = total
            require_space(part.parent, (size or 0) - start)
            # What tells this file from a later one at the same address.
            etag = response.headers.get("ETag") or ""
            value = etag if etag.startswith('"') else response.headers.get("Last-Modified")
            if value:
                _validator(part).write_text(value)
            with part.open("ab") as file:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    meter.add(len(chunk))
        length = _length(part)
        if size is None or length == size:
            return _given_checksum(response)
        if length > size:
            _discard(part, meter)
        raise ConnectionError(f"{length:,} of {size:,} bytes came")

    meter.add(_length(part))
    return with_retries(resume, is_transient, lambda: _length(part))


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _validator(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _discard(part: Path, meter: Meter) -> None:
    meter.add(-_length(part))
    part.unlink(missing_ok=True)
    _validator(part).unlink(missing_ok=True)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to safe addresses only, and shows no credentials to other hosts."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        check_address(newurl)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        old, new = (urllib.parse.urlsplit(url) for url in (req.full_url, newurl))
        if request is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            request.remove_header("Authorization")
        return request


def _open(url: str, part: Path, start: int, headers: dict[str, str]) -> Any:
    asked = {"User-Agent": "paligemma-jax", "Accept-Encoding": "identity", **headers}
    if start:
        asked["Range"] = f"bytes={start}-"
        if _validator(part).exists():  # otherwise the checksum will tell whether it is the same
            asked["If-Range"] = _validator(part).read_text()
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


def _given_checksum(response: Any) -> Checksum | None:
    """The checksum of the whole file in the answer's headers, if there is one."""
    for part in ",".join(response.headers.get_all("x-goog-hash") or []).split(","):
        name, _, value = part.strip().partition("=")
        if name == "md5":
            return Checksum("md5", base64.b64decode(value).hex())
    for header in ("X-Linked-Etag", "ETag"):
        value = (response.headers.get(header) or "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", value):
            return Checksum("sha256", value)
    return None


def with_retries(
    ask: Callable[[], T], passes: Callable[[Exception], bool], arrived: Callable[[], int] = int
) -> T:
    """What `ask` returns, asked again while the hub is overloaded or the connection breaks.

    Attempts count from the last one in which `arrived`, a number of bytes, grew.
    """
    failures = 0
    while True:
        before = arrived()
        try:
            return ask()
        except Exception as e:
            failures = 1 if arrived() > before else failures + 1
            if failures >= ATTEMPTS or not passes(e):
                raise
            asked = headers_of(e).get("retry-after", "")
        sleep(min(float(asked), LONGEST_WAIT) if asked.isdecimal() else 2.0 ** (failures - 1))


def status_of(error: Exception) -> int:
    """The HTTP status of an error, a client's or ours; 0 for one without an answer."""
    response = getattr(error, "response", None)
    return getattr(error, "status", 0) or getattr(response, "status_code", 0)


def headers_of(error: Exception) -> dict[str, str]:
    """The headers of the answer, their names in lower case."""
    headers = getattr(getattr(error, "response", error), "headers", None) or {}
    return {name.lower(): value for name, value in headers.items()}


def is_transient(error: Exception) -> bool:
    """Whether an error may pass, ours or a client's: an overloaded hub or a broken connection."""
    if status := status_of(error):
        return status in TRANSIENT
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, OSError):
        return error.errno not in _DISK
    is_client = library in ("httpx", "httpx2", "requests")
    return is_client or isinstance(error, http.client.HTTPException)


def require_space(directory: Path, nbytes: int) -> None:
    """Raises CheckpointError if that many more bytes have no room there."""
    place = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise CheckpointError(
            f"expected {nbytes / 1e9:,.2f} GB of free space in {directory}, got "
            f"{free / 1e9:,.2f} GB. Make room, or choose another cache directory: set HF_HOME "
            "(Hugging Face), KAGGLEHUB_CACHE (Kaggle) or XDG_CACHE_HOME (other addresses)"
        )
