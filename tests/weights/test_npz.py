import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.checkpoint import open_checkpoint


class Trap:
    """Unpickling this leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_pickled_arrays_are_refused_unread(tmp_path: Path, npz):
    trace = tmp_path / "trace"
    objects = np.empty(1, object)
    objects[0] = Trap(trace)
    path = npz({"params/img/head/bias": objects, "params/llm/x": np.zeros(1)})
    with pytest.raises(CheckpointError, match="bias.npy: pickled objects, refused"):
        open_checkpoint(path)
    path.write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(CheckpointError, match="is a Python pickle, which is refused"):
        open_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an npz file"),
        (b"PK\x03\x04 and then nothing", "is truncated: 21 bytes"),
        (b"<!DOCTYPE html><html>", "is not an npz file; it begins with b'<!DOCTYPE"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"\x93NUMPY\x01\x00", "is not an npz file"),
        (bytes(range(200, 256)), "is not an npz file"),
    ],
)
def test_files_that_are_no_npz(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "model.npz"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def member(shape: str, data: bytes = b"") -> bytes:
    """An npy file whose header claims `shape`."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    header = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (member("(1000000000000, 1000)"), "takes 4,000,000,000,000,000 bytes, 0 are there"),
        (member("(-1,)"), "shape"),
        (member("(3,)", bytes(12) + b"more"), "takes 12 bytes, 16 are there"),
        (member("(3,)", bytes(8)), "takes 12 bytes, 8 are there"),
        (member("__import__('os').abort()"), "img/x.npy"),
        (b"\x93NUMPY\x03\x00\x10\x00", "unknown npy version"),
        (b"no array at all", "img/x.npy"),
    ],
)
def test_headers_that_lie(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "model.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("img/x.npy", content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_a_zip_bomb_is_refused_by_its_directory(tmp_path: Path):
    path = tmp_path / "model.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("img/x.npy", "w") as file:
            for _ in range(100):
                file.write(bytes(1 << 20))
    with pytest.raises(CheckpointError, match="claim to unpack to 104,857,600"):
        open_checkpoint(path)


def test_foreign_byte_order_is_refused(npz):
    with pytest.raises(CheckpointError, match="img/x.npy: big-endian numbers"):
        open_checkpoint(npz({"img/x": np.zeros(1, ">f4")}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_must_be_unique(npz):
    twice = [("img/x", np.zeros(1)), ("img/x", np.ones(1))]
    with pytest.raises(CheckpointError, match="img/x: two arrays have this name"):
        open_checkpoint(npz(twice))


def test_members_that_are_no_arrays(tmp_path: Path):
    path = tmp_path / "model.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("img/evil.py", "print()")
    with pytest.raises(CheckpointError, match="img/evil.py: not an array"):
        open_checkpoint(path)


def test_other_models_are_refused(npz):
    with pytest.raises(CheckpointError, match="not a PaliGemma checkpoint.*params/resnet/conv"):
        open_checkpoint(npz({"params/resnet/conv": np.zeros(3)}))


def test_escaping_names_are_only_names(npz):
    with pytest.raises(CheckpointError, match=r"unexpected  \.\./\.\./img/x"):
        open_checkpoint(npz({"../../img/x": np.zeros(1), "img/y": np.zeros(1)}))


def test_a_flipped_bit_is_found_on_reading(published: Path, tmp_path: Path, all_arrays, flip):
    path = tmp_path / "model.npz"
    path.write_bytes((published / "model.npz").read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("params/llm/embedder/input_embedding.npy").header_offset
    flip(path, offset + 40_000)
    with pytest.raises(CheckpointError, match="damaged at params/llm/embedder/.*Bad CRC"):
        all_arrays(path)


def test_compressed_files_work(published: Path, tmp_path: Path, all_arrays):
    path = tmp_path / "model.npz"
    with zipfile.ZipFile(published / "model.npz") as old:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    plain = all_arrays(published / "model.npz")
    for name, array in all_arrays(path).items():
        assert array.tobytes() == plain[name].tobytes()


def test_numpy_reads_what_the_fixture_writes(published: Path):
    with np.load(published / "model.npz") as stored:
        assert stored["params/llm/final_norm/scale"].dtype == np.dtype("V2")
