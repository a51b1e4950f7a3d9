import http.server
import io
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.errors import InvalidImageError
from paligemma_jax.processing.image import download, load_image


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    return file.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            return self.send_error(404)
        if self.path.startswith("/to-"):
            self.send_response(302)
            target = {
                "/to-picture": "/picture",
                "/to-ftp": "ftp://localhost/x",
                "/to-loop": "/to-loop",
            }
            self.send_header("Location", target[self.path])
            return self.end_headers()
        self.send_response(200)
        self.end_headers()
        try:
            if self.path == "/trickle":
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            self.wfile.write(picture() if self.path == "/picture" else b"x" * 10_000)
        except OSError:
            pass  # the client has gone, as it should

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_off_by_default(server):
    with pytest.raises(InvalidImageError, match="allow_urls=True"):
        load_image(f"{server}/picture")


@pytest.mark.parametrize("path", ["picture", "to-picture"])
def test_picture(server, path):
    image = load_image(f"{server}/{path}", allow_urls=True)
    np.testing.assert_array_equal(np.asarray(image), np.full((2, 3, 3), (255, 0, 0)))


@pytest.mark.parametrize(
    "path, message", [("missing", "404"), ("to-ftp", "read"), ("to-loop", "HTTP")]
)
def test_failures(server, path, message):
    with pytest.raises(InvalidImageError, match=message):
        load_image(f"{server}/{path}", allow_urls=True)


def test_not_a_picture(server):
    with pytest.raises(InvalidImageError, match="is text"):
        load_image(f"{server}/text", allow_urls=True)


def test_size_and_time_are_bounded(server):
    with pytest.raises(InvalidImageError, match="more than 9,999 bytes"):
        download(f"{server}/text", max_bytes=9_999)
    assert len(download(f"{server}/text", max_bytes=10_000)) == 10_000
    start = time.monotonic()
    with pytest.raises(InvalidImageError, match="within 0.3 seconds"):
        download(f"{server}/trickle", max_bytes=10_000, timeout=0.3)
    assert time.monotonic() - start < 3


def test_nobody_answers():
    with pytest.raises(InvalidImageError, match="no answer"):
        download("http://127.0.0.1:9/x", max_bytes=10)
    with pytest.raises(InvalidImageError):
        download("http://[bad", max_bytes=10)
