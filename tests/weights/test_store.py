import dataclasses
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.filesystem import staged, staging_path
from paligemma_jax.weights.big_vision import big_vision_name
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.convert import convert, export_weights
from paligemma_jax.weights.formats import CheckpointMetadata
from paligemma_jax.weights.store import MANIFEST
from paligemma_jax.weights.views import ArrayWeights

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"


@pytest.fixture(scope="module")
def store(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint; do not change."""
    target = tmp_path_factory.mktemp("store") / "converted"
    convert(published / "huggingface", target)
    return target


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """The same to change."""
    return Path(shutil.copytree(store, tmp_path / "copy"))


def test_a_store_holds_the_same_checkpoint(store: Path, published: Path, all_arrays):
    before, after = open_checkpoint(published / "huggingface"), open_checkpoint(store)
    assert after.kind == "orbax"
    assert after.config == before.config
    assert after.specs == before.specs
    assert after.processor_settings == before.processor_settings
    assert after.tokenizer_bytes == before.tokenizer_bytes
    assert after.origin["sliding_window"] == 4096
    stored = all_arrays(store)
    for name, array in all_arrays(published / "huggingface").items():
        assert stored[name].dtype == "bfloat16" and stored[name].tobytes() == array.tobytes()
        assert stored[name].ctypes.data % 64 == 0


def test_its_files(store: Path):
    manifest = json.loads((store / MANIFEST).read_text())
    files = {path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {MANIFEST}
    assert {"config.json", "processor.json", "tokenizer.model"} < files
    embedding = manifest["arrays"]["llm/embedder/input_embedding/0"]
    assert embedding["dtype"] == "bfloat16" and embedding["bytes"] == 1600 * 16 * 2
    assert [path.name for path in store.parent.iterdir()] == [store.name]  # nothing beside it


def test_a_store_moves(copy: Path, store: Path, tmp_path: Path, all_arrays, monkeypatch):
    copy.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    moved = all_arrays(Path("elsewhere"))
    assert all(a.tobytes() == moved[name].tobytes() for name, a in all_arrays(store).items())


def test_narrowing_while_reading(published: Path, tmp_path: Path, all_arrays, npz, flip):
    """Rounded as numpy rounds, and digests are those of what is stored."""
    arrays = all_arrays(published / "model.npz", "float32")
    random = np.random.default_rng(0)
    for array in arrays.values():
        array[...] = random.standard_normal(array.shape)
    source = npz({big_vision_name(name): array for name, array in arrays.items()})
    convert(source, tmp_path / "wide", tokenizer=published / "tokenizer.model")
    for dtype in ("bfloat16", "float16"):
        for name, array in all_arrays(tmp_path / "wide", dtype).items():
            assert array.dtype == dtype
            assert array.tobytes() == arrays[name].astype(array.dtype).tobytes(), name
    largest = data_files(tmp_path / "wide")[-1]
    flip(largest, largest.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="/[01] was changed"):
        all_arrays(tmp_path / "wide", "bfloat16")


def data_files(store: Path) -> list[Path]:
    files = (path for path in (store / "params").rglob("*") if path.parent.name == "d")
    return sorted(files, key=lambda path: path.stat().st_size)


def test_a_flipped_bit_of_a_weight_is_found(copy: Path, store: Path, all_arrays, flip):
    largest = data_files(copy)[-1]
    flip(largest, largest.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"/\d was changed") as error:
        all_arrays(copy)
    assert "is damaged (1 problem)" in str(error.value)
    assert all_arrays(copy, verify=False).keys() == all_arrays(store).keys()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax
@pytest.mark.parametrize("where", [0.02, 0.3, 0.6, 0.9])
def test_a_flipped_bit_anywhere_is_found_or_harmless(
    where: float, copy: Path, store: Path, all_arrays, flip
):
    expected = all_arrays(store)
    for path in copy.rglob("*"):
        if not path.is_file() or not path.stat().st_size:
            continue
        content = path.read_bytes()
        flip(path, int(where * len(content)))
        try:
            found = all_arrays(copy)
        except CheckpointError:
            pass
        else:
            # The manifest has spaces, and digests of files whose arrays are digested themselves.
            assert path.is_relative_to(copy / "params") or path.name == MANIFEST, path
            assert all(found[n].tobytes() == a.tobytes() for n, a in expected.items()), path
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "processor.json", "tokenizer.model"])
def test_changed_settings_are_found(name: str, copy: Path):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content.replace(b"2", b"3"))
    with pytest.raises(CheckpointError, match=f"{name} was changed"):
        open_checkpoint(copy)
    (copy / name).write_bytes(content + b" ")
    with pytest.raises(CheckpointError, match=rf"{name} has [\d,]+ bytes of [\d,]+"):
        open_checkpoint(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        open_checkpoint(copy)


def test_lost_and_shortened_data(copy: Path):
    *_, other, largest = data_files(copy)
    largest.unlink()
    with other.open("r+b") as file:
        file.truncate(10)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(copy)
    assert "(2 problems)" in str(error.value)
    assert f"{largest.relative_to(copy).as_posix()} is missing" in str(error.value)


def test_without_a_manifest_it_is_unfinished(copy: Path):
    (copy / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no readable MANIFEST.json, so it is unfinished"):
        open_checkpoint(copy)


_BAD_FILES = json.dumps(
    {
        "format": "paligemma-jax",
        "version": 2,
        "files": {"config.json": {"bytes": "many", "sha256": 0}},
        "arrays": {},
    }
)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"format": "other", "version": 1}', _BAD_FILES]
)
def test_a_damaged_manifest(content: str, copy: Path):
    (copy / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match="damaged MANIFEST.json"):
        open_checkpoint(copy)


def test_a_newer_format_is_refused(copy: Path, edit_json):
    with edit_json(copy / MANIFEST) as manifest:
        manifest["version"] = 4
    with pytest.raises(CheckpointError, match="format version 4, this library reads 2"):
        open_checkpoint(copy)


def test_stored_dtypes_are_compared(copy: Path, edit_json, all_arrays):
    with edit_json(copy / MANIFEST) as manifest:
        manifest["arrays"]["img/head/bias"]["dtype"] = "float16"
    with pytest.raises(CheckpointError, match=r"bias is bfloat16 \(16,\), not float16 \(16,\)"):
        all_arrays(copy)


def test_an_existing_target_is_never_touched(published: Path, tmp_path: Path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("dear")
    with pytest.raises(CheckpointError, match="exists already, and is never overwritten"):
        convert(published / "model.npz", target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (target / "mine").read_text() == "dear"
    with pytest.raises(CheckpointError, match="exists already"):
        convert(published / "model.npz", target / "mine")


def test_a_store_does_not_say_where_it_was_written(tmp_path: Path, published: Path):
    target = tmp_path / "target"
    convert(published / "model.npz", target)
    files = [path for path in target.rglob("*") if path.is_file()]
    assert (target / "params" / "commit_success.txt") in files
    for path in files:
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_a_changed_mask_codec_is_noticed(tmp_path: Path):
    target = tmp_path / "demo"
    shutil.copytree(DEMO, target)
    codec = target / "mask_codec.npz"
    damaged = bytearray(codec.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    codec.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="mask_codec.npz was changed"):
        open_checkpoint(target)


def contents(tokenizer: bytes) -> CheckpointMetadata:
    return CheckpointMetadata({"image": {}, "encoding": "big_vision"}, tokenizer)


def test_arrays_must_fit_the_config(tmp_path: Path, pg2, tokenizer: bytes, published, all_arrays):
    arrays = all_arrays(published / "model.npz")
    arrays["img/head/biass"] = arrays.pop("img/head/bias")
    target = tmp_path / "target"
    with pytest.raises(CheckpointError, match=r"missing     img/head/bias \(16,\)"):
        export_weights(target, ArrayWeights(pg2, arrays), contents(tokenizer))
    assert list(tmp_path.iterdir()) == []


class Broken(ArrayWeights):
    """Weights that cannot be read to the end."""

    error: BaseException

    def read_chunk(self, name: str, index: int, out: np.ndarray) -> None:
        super().read_chunk(name, index, out)
        if name == "llm/layers/mlp/linear/w" and index == 1:
            raise self.error


@pytest.mark.parametrize("format", ["orbax", "huggingface", "big_vision"])
@pytest.mark.parametrize("name", ["target", "target.npz"])
def test_errors_leave_nothing(
    format: str, name: str, tmp_path: Path, pg2, published: Path, tokenizer: bytes, all_arrays
):
    if name.endswith("npz") and format != "big_vision":
        pytest.skip("no file")
    weights = Broken(pg2, all_arrays(published / "model.npz"))
    for error in (CheckpointError("source is damaged"), KeyboardInterrupt(), OSError(28, "full")):
        weights.error = error
        with pytest.raises((CheckpointError, KeyboardInterrupt)) as raised:
            export_weights(tmp_path / "new" / name, weights, contents(tokenizer), format)
        if isinstance(error, OSError):
            assert "failed: full. Nothing of it was left behind" in str(raised.value)
        assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_is_noticed_before(tmp_path: Path):
    with pytest.raises(CheckpointError, match="needs 1,000,000,000.0 GB, but"):
        with staged(tmp_path / "target", 10**18):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be(tmp_path: Path, published: Path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Nothing can be written into"):
        convert(published / "model.npz", tmp_path / "file/target")


SLOW_WRITER = """
import sys, time
from pathlib import Path
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.formats import CheckpointMetadata
from paligemma_jax.weights.convert import export_weights
from paligemma_jax.weights.views import View

class Slow(View):
    def read_chunk(self, name, index, out):
        super().read_chunk(name, index, out)
        if name == "img/blocks/mlp/fc2/kernel":
            print("writing", flush=True)
            time.sleep(600)

source, target = map(Path, sys.argv[1:])
import paligemma_jax.weights.store as module
module._CHUNK = 4096  # bytes, so that there are many saves
export_weights(target, Slow(open_checkpoint(source)), CheckpointMetadata({}, b"words"))
"""


def test_a_killed_conversion_leaves_nothing_that_loads(published: Path, tmp_path: Path):
    target = tmp_path / "target"
    source = published / "huggingface"
    command = [sys.executable, "-c", SLOW_WRITER, str(source), str(target)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        with pytest.raises(CheckpointError, match="Another process is writing"):
            convert(source, target)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    leftover = staging_path(target)
    assert not target.exists() and any((leftover / "params.partial_save").parent.iterdir())
    for path in (target, leftover):
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    convert(source, target)
    assert open_checkpoint(target).config == open_checkpoint(source).config
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_given_config_must_fit(store: Path, pg2: PaliGemmaConfig):
    llm = dataclasses.replace(pg2.llm, sliding_window=5)
    given = dataclasses.replace(pg2, llm=llm)
    assert open_checkpoint(store, config=given).config == given
    llm = dataclasses.replace(pg2.llm, depth=3)
    with pytest.raises(CheckpointError, match=r"missing     llm/layers/\S+/2 \("):
        open_checkpoint(store, config=dataclasses.replace(pg2, llm=llm))


@pytest.mark.parametrize("is_file", [False, True])
def test_file_that_does_not_reach_the_disk_is_an_error_but_a_directory_may_not_sync(
    is_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def write(target: Path, fails: Callable[[int], bool]) -> None:
        def fsync(descriptor: int) -> None:
            if fails(os.fstat(descriptor).st_mode):
                raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fsync)
        with staged(target, 1, is_file=is_file) as staging:
            (staging if is_file else staging / "file").write_bytes(b"x")

    write(tmp_path / "written", stat.S_ISDIR)
    assert (tmp_path / "written").exists()
    with pytest.raises(CheckpointError, match="Writing .* failed: Input/output error"):
        write(tmp_path / "lost", stat.S_ISREG)
    assert [path.name for path in tmp_path.iterdir()] == ["written"]
