"""Reading a picture's bytes from an http(s) address, bounded in size and time."""

import time
import urllib.error
import urllib.request
from http.client import HTTPException

from paligemma_jax.errors import InvalidImageError

_CHUNK = 1 << 16


def _opener() -> urllib.request.OpenerDirector:
    """An opener for http(s) alone: `build_opener` would also follow redirects to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def download(url: str, *, max_bytes: int, timeout: float = 30.0) -> bytes:
    """Body behind an http(s) `url`; InvalidImageError if it is unreachable, too large or too slow.

    `timeout` in seconds bounds the whole transfer. Private addresses are not filtered: let only
    trusted people choose the address.
    """
    deadline = time.monotonic() + timeout
    body = bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "paligemma-jax"})
        with _opener().open(request, timeout=timeout) as response:
            # read1 returns what has arrived, so that a trickle cannot outlast the deadline.
            while chunk := response.read1(_CHUNK):
                body += chunk
                if len(body) > max_bytes:
                    raise InvalidImageError(
                        f"{url} sends more than {max_bytes:,} bytes. A picture file of at most "
                        "that size fits. Download it and pass a smaller copy."
                    )
                if time.monotonic() > deadline:
                    raise TimeoutError
    except TimeoutError as e:
        raise InvalidImageError(
            f"{url} did not arrive within {timeout:g} seconds. "
            "Download the picture first and pass its path."
        ) from e
    except (OSError, HTTPException, ValueError) as e:
        if isinstance(e, InvalidImageError):
            raise
        reason = f"HTTP status {e.code}" if isinstance(e, urllib.error.HTTPError) else "no answer"
        raise InvalidImageError(
            f"{url} could not be read ({reason}). An address that serves a picture file is needed. "
            "Open it in a browser, or download the picture and pass its path."
        ) from e
    return bytes(body)
