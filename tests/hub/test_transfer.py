"""One file from a server that fails in every way."""

import base64
import hashlib
from pathlib import Path

import pytest

from paligemma_jax.errors import CheckpointError
from paligemma_jax.hub.http import Checksum, FetchError, Meter, fetch
from tests.hub.server import Cut, FakeHub, Fault, Flipped, Status

CONTENT = bytes(range(256)) * 20_000
SHA256 = Checksum("sha256", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def seen() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture
def meter(seen: list[tuple[str, int, int]]) -> Meter:
    return Meter(lambda *values: seen.append(values))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "files" / "model.npz"


@pytest.fixture(autouse=True)
def file(hub: FakeHub, waits: list[float]) -> None:
    hub.files["/model.npz"] = CONTENT
    hub.headers["/model.npz"] = {"ETag": '"one"'}


def siblings(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir()]


def test_file_is_whole_and_counted(hub: FakeHub, target: Path, meter: Meter, seen):
    fetch(f"{hub.url}/model.npz", target, meter)
    assert target.read_bytes() == CONTENT and siblings(target) == ["model.npz"]
    assert seen[0] == ("model.npz", 0, 0)
    assert seen[-1] == ("model.npz", len(CONTENT), len(CONTENT))


@pytest.mark.parametrize(
    ("faults", "waited", "requests"),
    [
        ([Status(429, {"Retry-After": "7"})], [7.0], 2),
        ([Status(429)], [1.0], 2),
        ([Status(500), Status(503), Status(502)], [1.0, 2.0, 4.0], 4),
        ([Cut(1000), Cut(3_000_000)], [1.0, 1.0], 3),
        ([Cut(0)], [1.0], 2),
        ([Flipped()], [], 2),
        ([Status(500), Cut(5000), Flipped()], [1.0, 1.0], 4),
    ],
)
def test_faults_that_pass(
    hub: FakeHub, target: Path, meter: Meter, seen, waits, faults: list[Fault], waited, requests
):
    hub.faults["/model.npz"] = faults
    fetch(f"{hub.url}/model.npz", target, meter, checksum=SHA256)
    assert target.read_bytes() == CONTENT and siblings(target) == ["model.npz"]
    assert waits == waited and len(hub.requests) == requests
    assert seen[-1][1] == len(CONTENT)


def test_goes_on_where_an_earlier_process_stopped(hub: FakeHub, target: Path, meter: Meter, seen):
    target.parent.mkdir()
    part = target.with_name("model.npz.partial")
    part.write_bytes(CONTENT[:4_000_000])
    part.with_name("model.npz.partial.etag").write_text('"one"')
    fetch(f"{hub.url}/model.npz", target, meter)
    (request,) = hub.requests
    assert request.headers["range"] == "bytes=4000000-"
    assert request.headers["if-range"] == '"one"'
    assert target.read_bytes() == CONTENT and siblings(target) == ["model.npz"]
    assert seen[1][1] == 4_000_000 and seen[-1][1:] == (len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("change", ["file", "ranges", "too long", "all there"])
def test_what_is_there_does_not_fit(hub: FakeHub, target: Path, meter: Meter, change: str):
    target.parent.mkdir()
    part = target.with_name("model.npz.partial")
    part.write_bytes(b"x" * 1000)
    if change == "file":
        part.with_name("model.npz.partial.etag").write_text('"another"')
    elif change == "ranges":
        hub.ranges = False
    elif change == "too long":
        part.write_bytes(CONTENT + b"x")
    else:
        part.write_bytes(CONTENT)
    fetch(f"{hub.url}/model.npz", target, meter, checksum=SHA256)
    assert target.read_bytes() == CONTENT and meter.done == len(CONTENT)


@pytest.mark.parametrize("told", [False, True])
def test_damaged_twice_leaves_nothing(hub: FakeHub, target: Path, meter: Meter, told: bool):
    hub.faults["/model.npz"] = [Flipped(), Flipped()]
    if told:  # by the server, as Google's storage does
        md5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
        hub.headers["/model.npz"]["x-goog-hash"] = f"crc32c=AAAAAA==,md5={md5}"
    with pytest.raises(FetchError, match="checksum"):
        fetch(f"{hub.url}/model.npz", target, meter, checksum=None if told else SHA256)
    assert siblings(target) == [] and len(hub.requests) == 2


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refused_at_once(hub: FakeHub, target: Path, meter: Meter, status: int):
    hub.faults["/model.npz"] = [Status(status, {"X-Error-Code": "GatedRepo"})]
    with pytest.raises(FetchError) as e:
        fetch(f"{hub.url}/model.npz", target, meter)
    assert e.value.status == status and e.value.headers["x-error-code"] == "GatedRepo"
    assert len(hub.requests) == 1 and not target.exists()


def test_redirect_shows_no_token_to_another_host(hub: FakeHub, target: Path, meter: Meter):
    hub.redirects["/one"] = f"{hub.url}/two"
    hub.redirects["/two"] = f"{hub.other_url}/model.npz"
    fetch(f"{hub.url}/one", target, meter, headers={"Authorization": "Bearer secret"})
    assert [request.headers.get("authorization") for request in hub.requests] == [
        "Bearer secret", "Bearer secret", None,
    ]  # fmt: skip
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["http://example.com/model.npz", "file:///etc/passwd"])
def test_redirect_to_an_unsafe_place_is_not_followed(
    hub: FakeHub, target: Path, meter: Meter, place: str
):
    hub.redirects["/one"] = place
    with pytest.raises((CheckpointError, FetchError), match="no safe address|not allowed"):
        fetch(f"{hub.url}/one", target, meter)


def test_git_digest(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"hello\n")  # git hash-object
    assert Checksum("git", "").of(path) == "ce013625030ba8dba906f756967f9e9ca394464a"
