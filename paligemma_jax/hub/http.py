"""One file over HTTP: tried again, resumed where it stopped, checked, and whole or not there.

huggingface_hub itself deletes a partial file when a download fails, which may be gigabytes, and
compares no content with the checksum that its hub gives.
"""

import base64
import dataclasses
import email.utils
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


class FetchError(Exception):
    """A file that did not come.

    Attributes:
      status: of HTTP, where the server answered with something else; 0 without an answer.
      damaged: whether what arrived, twice, has another checksum.
      headers: of the answer.
    """

    def __init__(
        self,
        reason: str,
        status: int = 0,
        damaged: bool = False,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(reason)
        self.status, self.damaged, self.headers = status, damaged, headers or {}


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
    *,
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
    for last in (False, True):
        expected = _receive(url, part, meter, dict(headers or {}), size)
        expected = checksum or expected
        found = expected and expected.of(part)
        if expected is None or found == expected.value:
            os.replace(part, target)
            _validator(part).unlink(missing_ok=True)
            return
        _discard(part, meter)
        if last:
            raise FetchError(f"its checksum is {found}, not {expected.value}", damaged=True)


def _receive(
    url: str, part: Path, meter: Meter, headers: dict[str, str], size: int | None
) -> Checksum | None:
    """Fills `part`; returns the checksum that the server gives."""
    meter.add(_length(part))
    known = size is not None
    failures, wait = 0, 1.0
    while True:
        start = _length(part)
        asked: float | None = None
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
                require_space(part.parent, (size or 0) - start)
                # What tells this file from a later one at the same address.
                etag = response.headers.get("ETag") or ""
                value = etag if etag.startswith('"') else response.headers.get("Last-Modified")
                if value:
                    _validator(part).write_text(value)
                checksum = _given_checksum(response)
                with part.open("ab") as file:
                    while chunk := _read(response):
                        file.write(chunk)
                        meter.add(len(chunk))
            length = _length(part)
            if size is None or length == size:
                return checksum
            if length > size:
                _discard(part, meter)
            raise ConnectionError(f"{length:,} of {size:,} bytes came")
        except urllib.error.HTTPError as e:
            if e.code == 416 and part.exists():
                if e.headers.get("Content-Range") == f"bytes */{start}":
                    return _given_checksum(e)  # all of it was there
                _discard(part, meter)  # another file by now
            elif e.code not in TRANSIENT:
                raise FetchError(
                    f"{e.code} {e.reason}".strip(), e.code, headers=dict(e.headers or {})
                ) from e
            why: Exception = e
            asked = retry_after(e.headers.get("Retry-After") if e.headers else None)
        except (OSError, http.client.HTTPException) as e:
            if isinstance(e, OSError) and e.errno in _DISK:
                raise CheckpointError(
                    f"{part} cannot be written: {e.strerror}. Make room, or choose another cache "
                    "directory; what has arrived is kept."
                ) from e
            why = e
        if _length(part) > start:
            failures, wait = 0, 1.0
        failures += 1
        if failures >= ATTEMPTS:
            raise FetchError(str(getattr(why, "reason", why)) or type(why).__name__) from why
        sleep(wait if asked is None else asked)
        wait = min(2 * wait, 30.0)


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


def _read(response: Any) -> bytes:
    try:
        return response.read(_CHUNK)
    except http.client.IncompleteRead as e:
        return e.partial  # counted, and missed afterwards


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


def with_retries(ask: Callable[[], T], passes: Callable[[Exception], bool]) -> T:
    """What `ask` returns, asked again while the hub is overloaded or the connection breaks."""
    wait = 1.0
    for _ in range(ATTEMPTS - 1):
        try:
            return ask()
        except Exception as e:
            if not passes(e):
                raise
            response = getattr(e, "response", None)
            asked = None if response is None else retry_after(response.headers.get("Retry-After"))
        sleep(wait if asked is None else asked)
        wait *= 2
    return ask()


def status_of(error: Exception) -> int:
    """The HTTP status of an error, a client's or ours; 0 for one without an answer."""
    if isinstance(error, FetchError):
        return error.status
    return getattr(getattr(error, "response", None), "status_code", 0)


def is_transient(error: Exception) -> bool:
    """Whether a client's error may pass: an overloaded hub or a broken connection."""
    status = status_of(error)
    if status:
        return status in TRANSIENT
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library in ("httpx", "httpx2", "requests")


def retry_after(value: str | None) -> float | None:
    """Seconds that a server asks to wait, given as such or as a date; at most LONGEST_WAIT."""
    try:
        seconds = float(value or "none")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_WAIT)


def require_space(directory: Path, nbytes: int) -> None:
    """Raises CheckpointError if that many more bytes have no room there."""
    place = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise CheckpointError(
            f"{nbytes / 1e9:,.2f} GB are to be downloaded, but {directory} has "
            f"{free / 1e9:,.2f} GB free. Make room, or choose another cache directory: set HF_HOME "
            "(Hugging Face), KAGGLEHUB_CACHE (Kaggle) or XDG_CACHE_HOME (other addresses)"
        )
