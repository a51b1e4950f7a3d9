"""One file over HTTP: tried again, gone on with where it stopped, checked, and whole or not there.

The clients of the hubs go on within a process at best; what a killed process had is lost to them,
and that may be gigabytes. None of them compares the content with the digest that its hub gives.
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
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from paligemma_jax.errors import CheckpointError
from paligemma_jax.hub.meter import Meter
from paligemma_jax.hub.sources import check_address

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
