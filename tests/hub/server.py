"""A mock of the hubs, which can fail in every way that they do."""

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Mapping
from typing import Any, NamedTuple

KAGGLE = "/v1/models.ModelApiService/"
Handler = http.server.BaseHTTPRequestHandler
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Status(NamedTuple):
    """Answered once instead of the file."""

    code: int
    headers: Mapping[str, str] = {}


class Cut(NamedTuple):
    """The connection ends after so many bytes of the answer."""

    after: int


class Flipped(NamedTuple):
    """One bit of the answer is another."""


Fault = Status | Cut | Flipped


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    path: str
    headers: dict[str, str]


class FakeHub:
    """Files by path, faults by path (each used once, in order), and what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.redirects: dict[str, str] = {}
        self.requests: list[Request] = []
        self.token: str | None = None  # without it, files of repositories are gated
        self.ranges = True
        hub = self

        class Answer(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.handle_error = lambda request, client_address: None  # a client that hangs up
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.other_url = f"http://localhost:{self.port}"  # another host, for a client

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self, path: str) -> list[Request]:
        """The requests for a path."""
        return [request for request in self.requests if request.path == path]

    def add_repository(
        self, name: str, files: Mapping[str, bytes], revision: str = "main", commit: str = COMMIT
    ) -> None:
        """A repository of Hugging Face; its large files are elsewhere, as they really are."""
        siblings = []
        for file, content in files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sibling: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": blob}
            path = f"/{name}/resolve/{commit}/{file}"
            if file.endswith((".json", ".md")):
                self.files[path] = content
            else:
                digest = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 134}
                self.redirects[path] = f"{self.other_url}/cdn/{digest}"
                self.files[f"/cdn/{digest}"] = content
                self.headers[f"/cdn/{digest}"] = {"ETag": f'"{digest}"'}
            siblings.append(sibling)
        info = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [],
                "downloads": 0, "likes": 0, "private": False}  # fmt: skip
        self.files[f"/api/models/{name}/revision/{revision}"] = json.dumps(info).encode()

    def _answer(self, handler: Handler) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(handler.path).path)
        headers = {key.lower(): value for key, value in handler.headers.items()}
        body = handler.rfile.read(int(headers.get("content-length", 0)))
        if path.startswith(KAGGLE):
            path = self._kaggle_path(path.removeprefix(KAGGLE), json.loads(body))
        elif path.startswith("/api/") and not path.startswith("/api/models/"):
            return _send(handler, 404, b"", {})  # what a client asks for its own purposes
        self.requests.append(Request(handler.command, path, headers))
        waiting = self.faults.get(path)
        fault = waiting.pop(0) if waiting else None
        if isinstance(fault, Status):
            return _send(handler, fault.code, b"no", dict(fault.headers))
        gated = self.token is not None and ("/resolve/" in path or path.startswith("/kaggle/"))
        if gated and headers.get("authorization") != f"Bearer {self.token}":
            code = 403 if "authorization" in headers else 401
            return _send(handler, code, b"no", {"X-Error-Code": "GatedRepo"})
        if path in self.redirects:
            return _send(handler, 302, b"", {"Location": self.redirects[path]})
        if path not in self.files:
            return self._send_nothing(handler, path)
        self._send_file(handler, path, headers, fault)

    def add_kaggle_model(self, handle: str, version: int, files: Mapping[str, bytes]) -> None:
        """A model of Kaggle, whose files its storage has."""
        self.files[f"/kaggle/{handle}"] = json.dumps({"versionNumber": version}).encode()
        names = {"files": [{"name": name} for name in files]}
        self.files[f"/kaggle/{handle}/{version}"] = json.dumps(names).encode()
        for name, content in files.items():
            self.files[f"/storage/{name}"] = content
            md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
            self.headers[f"/storage/{name}"] = {
                "x-goog-hash": f"md5={md5}",
                "Accept-Ranges": "bytes",
            }
            self.redirects[f"/kaggle/{handle}/{version}/{name}"] = f"{self.url}/storage/{name}"

    def _kaggle_path(self, call: str, body: dict[str, Any]) -> str:
        framework = body["framework"].removeprefix("MODEL_FRAMEWORK_").lower()
        path = f"/kaggle/{body['ownerSlug']}/{body['modelSlug']}/{framework}/{body['instanceSlug']}"
        if call != "GetModelInstance":
            path += f"/{body['versionNumber']}"
        return f"{path}/{body['path']}" if body.get("path") else path

    def _send_nothing(self, handler: Handler, path: str) -> None:
        if not path.startswith("/api/models/"):
            return _send(handler, 404, b"no", {})
        repository = path.partition("/revision/")[0]
        if any(file.startswith(f"{repository}/") for file in self.files):
            return _send(handler, 404, b"no", {"X-Error-Code": "RevisionNotFound"})
        # Nobody is told whether it is private or not there.
        return _send(handler, 401, b"no", {"X-Error-Code": "RepoNotFound"})

    def _send_file(
        self, handler: Handler, path: str, headers: dict[str, str], fault: Fault | None
    ) -> None:
        content, more = self.files[path], dict(self.headers.get(path, {}))
        status, start = 200, 0
        same = headers.get("if-range", more.get("ETag")) == more.get("ETag")
        if self.ranges and same and headers.get("range", "").startswith("bytes="):
            start = int(headers["range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                more["Content-Range"] = f"bytes */{len(content)}"
                return _send(handler, 416, b"", more)
            status = 206
            more["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if isinstance(fault, Flipped):
            body = bytes([body[0] ^ 1]) + body[1:]
        cut = fault.after if isinstance(fault, Cut) else None
        _send(handler, status, body, more, cut)


def _send(
    handler: Handler, status: int, body: bytes, headers: Mapping[str, str], cut: int | None = None
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    if cut is not None:
        handler.send_header("Connection", "close")
        handler.close_connection = True
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body[:cut])
