"""The client of Hugging Face and this package's downloads against a mock hub."""

import multiprocessing
import shutil
import sys
from pathlib import Path

import pytest

from paligemma_jax.errors import CheckpointError
from paligemma_jax.hub.catalogue import HuggingFace
from paligemma_jax.hub.download import cached, download
from paligemma_jax.loading import demo_checkpoint, find_checkpoint
from paligemma_jax.weights.checkpoint import open_checkpoint
from tests.hub.server import COMMIT, Cut, FakeHub, Fault, Flipped, Status
from tests.hub.together import fetch_at_once

GOLDEN = Path(__file__).parents[1] / "golden" / "huggingface" / "pg1" / "hub_old"
NAME = "google/paligemma-3b-pt-224"
LOCATION = HuggingFace(NAME)
INFO = f"/api/models/{NAME}/revision/main"
FILES = {path.name: path.read_bytes() for path in GOLDEN.iterdir()} | {
    "tokenizer.model": b"tokenizer",
    "README.md": b"# PaliGemma",
    "pytorch_model.bin": b"pickles",
}
NEEDED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}
WEIGHTS = f"/{NAME}/resolve/{COMMIT}/model.safetensors"

huggingface_hub = pytest.importorskip("huggingface_hub", reason='pip install "paligemma-jax[hub]"')


@pytest.fixture(autouse=True)
def repository(hub: FakeHub, waits: list[float]) -> None:
    hub.add_repository(NAME, FILES)


def cdn(hub: FakeHub) -> str:
    """Path of the weights after the redirect."""
    return hub.redirects[WEIGHTS].removeprefix(hub.other_url)


def read(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_only_what_is_needed_once_then_without_the_hub(hub: FakeHub, monkeypatch):
    seen: list[tuple[str, int, int]] = []
    path = find_checkpoint("paligemma-3b-pt-224", progress=lambda *values: seen.append(values))
    assert read(path) == {name: FILES[name] for name in NEEDED}
    total = sum(len(FILES[name]) for name in NEEDED)
    assert seen[-1][1:] == (total, total) and all(done <= all_ for _, done, all_ in seen)
    assert len(hub.requests) == 1 + len(NEEDED) + 2  # two of them are redirected
    cache = path.parents[2]
    found = huggingface_hub.try_to_load_from_cache(NAME, "model.safetensors", cache_dir=cache)
    assert found == str(path / "model.safetensors")
    hub.close()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not even the client is needed
    for name in (NAME, f"{NAME}@{COMMIT}", "pali_gemma_3b_224", "hf://" + NAME):
        assert find_checkpoint(name) == path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_checkpoint(NAME, local_only=True) == path
    with open_checkpoint(path) as checkpoint:  # through the links of the cache
        assert checkpoint.kind == "huggingface" and checkpoint.config.text_length == 128


def test_what_the_client_downloaded_is_used(hub: FakeHub, caches: Path):
    folder = caches / "huggingface" / "hub" / "models--google--paligemma-3b-pt-224"
    snapshot = folder / "snapshots" / COMMIT
    shutil.copytree(GOLDEN, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    assert cached(LOCATION) is None  # no tokenizer yet
    (snapshot / "tokenizer.model").write_bytes(b"tokenizer")
    assert download(LOCATION) == snapshot and not hub.requests
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert cached(LOCATION) is None
    (snapshot / "b.safetensors").touch()
    assert cached(LOCATION) == snapshot


@pytest.mark.parametrize("place", ["info", "resolve", "cdn"])
def test_faults_that_pass(hub: FakeHub, waits: list[float], place: str):
    path = {"info": INFO, "resolve": WEIGHTS, "cdn": cdn(hub)}[place]
    faults: list[Fault] = [Status(429, {"Retry-After": "3"}), Status(500)]
    hub.faults[path] = faults + ([Cut(1000), Flipped()] if place == "cdn" else [])
    assert read(download(LOCATION)) == {name: FILES[name] for name in NEEDED}
    assert not hub.faults[path] and waits[0] == 3.0


def test_resumes_after_a_failure(hub: FakeHub):
    hub.faults[cdn(hub)] = [Cut(100_000), *[Cut(0)] * 20]
    with pytest.raises(CheckpointError, match="What has arrived is kept"):
        download(LOCATION)
    assert cached(LOCATION) is None
    hub.faults.clear()
    hub.requests.clear()
    download(LOCATION)
    (request,) = hub.asked(cdn(hub))
    assert request.headers["range"] == "bytes=100000-"
    assert len(hub.requests) == 3  # the list, and one file with its redirect


def test_wrong_checksum_leaves_nothing(hub: FakeHub, caches: Path):
    hub.faults[cdn(hub)] = [Flipped(), Flipped()]
    with pytest.raises(CheckpointError, match="was damaged on its way"):
        download(LOCATION)
    assert cached(LOCATION) is None
    blobs = caches / "huggingface" / "hub" / "models--google--paligemma-3b-pt-224" / "blobs"
    assert not list(blobs.glob("*.partial")) and len(list(blobs.iterdir())) == 3


def test_gated(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    hub.faults[INFO] = [Status(401, {"X-Error-Code": "GatedRepo"})]
    with pytest.raises(CheckpointError, match="is gated, and no account"):
        download(LOCATION)
    hub.token = "hf_right"
    with pytest.raises(CheckpointError) as e:
        download(LOCATION)
    page = f"{hub.url}/{NAME}"
    copy = "gs://vertex-model-garden-paligemma-us/paligemma/pt_224.npz"
    for words in (f"Open {page}, accept the licence", "hf auth login", "HF_TOKEN", copy):
        assert words in str(e.value)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match="may not read it.*Open .* with that account"):
        download(LOCATION)
    monkeypatch.setenv("HF_TOKEN", " hf_right\n")
    download(LOCATION)
    (request,) = hub.asked(cdn(hub))
    assert "authorization" not in request.headers  # of another host


def test_revisions(hub: FakeHub):
    other = "f" * 40
    hub.add_repository(NAME, FILES | {"tokenizer.model": b"other"}, "bfloat16", other)
    main = download(LOCATION)
    half = find_checkpoint(NAME, revision="bfloat16")
    assert (main.name, half.name) == (COMMIT, other)
    assert len(hub.asked(cdn(hub))) == 1  # of the same weights there is one copy
    with pytest.raises(CheckpointError, match="no revision v9. There are main, bfloat16, float16"):
        find_checkpoint(f"{NAME}@v9")
    hub.add_repository(NAME, FILES | {"tokenizer.model": b"newer"}, commit="e" * 40)
    assert download(LOCATION) == main  # nothing is asked
    newer = download(LOCATION, refresh=True)
    assert newer.name == "e" * 40 and read(newer)["tokenizer.model"] == b"newer"
    assert download(LOCATION) == newer


def test_jax_twin(hub: FakeHub):
    parts = {f"paligemma.b16.npz.part{i}": bytes([i]) * 1000 for i in range(3)}
    hub.add_repository(f"{NAME}-jax", {**parts, "README.md": b""})
    assert read(find_checkpoint("paligemma-3b-pt-224-jax")) == parts


def test_directory_that_paligemma_convert_wrote(hub: FakeHub):
    demo = demo_checkpoint()
    files = {
        path.relative_to(demo).as_posix(): path.read_bytes()
        for path in demo.rglob("*")
        if path.is_file()
    }
    hub.add_repository("someone/demo", files | {"README.md": b"# Demo"})
    path = find_checkpoint("someone/demo")
    assert not (path / "README.md").exists()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.kind == "orbax" and checkpoint.tokenizer is not None
        name = min(checkpoint.specs, key=lambda name: checkpoint.specs[name].size)
        checkpoint.read(name, checkpoint.specs[name].dtype)


def test_not_there(hub: FakeHub):
    with pytest.raises(CheckpointError, match="neither a path here nor a model at Hugging Face"):
        find_checkpoint("someone/nothing")
    hub.close()
    with pytest.raises(CheckpointError, match="cannot be downloaded from 127.0.0.1"):
        download(LOCATION)


def test_too_little_space(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="HF_HOME"):
        download(LOCATION)
    assert len(hub.requests) == 1


def test_processes_that_start_together_download_once(hub: FakeHub):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    arguments = (LOCATION, barrier, results)
    processes = [spawn.Process(target=fetch_at_once, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    paths = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(paths) == 1 and read(Path(paths.pop())) == {name: FILES[name] for name in NEEDED}
    assert len(hub.requests) == 1 + len(NEEDED) + 2


@pytest.mark.parametrize(
    ("files", "commit"),
    [
        ({"MANIFEST.json": b"{}", "../../evil": b"x"}, COMMIT),
        (FILES, "../../evil"),
        (FILES, "main"),
    ],
)
def test_paths_and_commits_that_lead_outside(hub: FakeHub, files: dict[str, bytes], commit: str):
    hub.add_repository(NAME, files, commit=commit)
    with pytest.raises(CheckpointError, match="without checksum, or outside"):
        download(LOCATION)
