import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.safetensors_io import INDEX, read_header


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_rows_are_read_in_place(tmp_path: Path):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    header = {"a": entry([4, 3], 0, 48), "n": entry([], 48, 52), "i": entry([2], 52, 68, "I64")}
    data = values.tobytes() + np.float32(7).tobytes() + bytes(16)
    tensors = read_header(write(tmp_path / "x.safetensors", header, data))
    np.testing.assert_array_equal(tensors["a"].read(), values)
    np.testing.assert_array_equal(tensors["a"].read(slice(1, 3)), values[1:3])
    out = np.zeros((2, 3), np.float32)
    assert tensors["a"].read(slice(2, 4), out=out) is out
    np.testing.assert_array_equal(out, values[2:])
    assert tensors["i"].dtype is None


def test_agrees_with_the_safetensors_library(golden: Path):
    library = pytest.importorskip("safetensors.numpy")
    path = golden / "huggingface/pg2/hub_old/model.safetensors"
    reference = library.load_file(path)
    tensors = read_header(path)
    assert tensors.keys() == reference.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(), reference[name])


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"", b"", 0, "not a safetensors file"),
        (b"{}", b"", 2**63, "not a safetensors file"),
        (b"{}", b"", 5000, "truncated, its header of 5,000 bytes ends beyond 10"),
        (b"nonsense", b"", None, "not a safetensors file"),
        (b"\xff\xfe", b"", None, "not a safetensors file"),
        (b"[" * 100_000, b"", None, "not a safetensors file"),
        ([], b"", None, "not a safetensors file"),
        (b'{"a": {}, "a": {}}', b"", None, "a is there twice"),
        ({"a": [1]}, b"", None, "the entry of a is malformed"),
        ({"a": entry([2], 0, 8)}, bytes(7), None, "truncated, "),
        ({"a": entry([2], 0, 8)}, bytes(9), None, "too long"),
        ({"a": entry([2], 4, 12)}, bytes(12), None, "overlap or leave a gap"),
        ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, bytes(8), None, "overlap or leave a gap"),
        ({"a": entry([3], 0, 8)}, bytes(8), None, "contradicts its shape"),
        ({"a": entry([-2], 0, 8)}, bytes(8), None, "contradicts its shape"),
        ({"a": entry([2**62, 2**62], 0, 8)}, bytes(8), None, "contradicts its shape"),
        ({"a": entry([2], 0, 8, "F5")}, bytes(8), None, "unknown dtype F5"),
    ],
)
def test_damaged_files(
    header: object, data: bytes, length: int | None, message: str, tmp_path: Path
):
    path = write(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_foreign_files(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(CheckpointError, match="a Git LFS pointer"):
        read_header(path)
    path.write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="truncated, 3 bytes"):
        read_header(path)


@pytest.fixture
def shards(tmp_path: Path, pg2, synthetic) -> Path:
    synthetic.write_hugging_face(tmp_path / "hf", pg2, shard_bytes=9_000)
    return tmp_path / "hf"


def test_all_problems_with_shards_are_listed(shards: Path, edit_json):
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    (shards / names[0]).unlink()
    with (shards / names[1]).open("r+b") as file:
        file.truncate(1000)
    with edit_json(shards / INDEX) as index:
        index["weight_map"]["extra.weight"] = names[2]
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(shards)
    for problem in (
        "(3 problems)",
        f"{names[0]} is missing",
        f"{names[1]}: truncated",
        f"extra.weight is not in {names[2]}, where the index says it is",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize("name", ["../{0}", "/etc/passwd", "sub/../../x", "..", "a\\b", "", "\0"])
def test_the_index_names_only_its_own_directory(name: str, shards: Path, edit_json):
    with edit_json(shards / INDEX) as index:
        key = next(iter(index["weight_map"]))
        index["weight_map"][key] = name.format(index["weight_map"][key])
    with pytest.raises(CheckpointError, match="not a plain file name"):
        open_checkpoint(shards)


def test_links_out_of_the_directory(shards: Path, tmp_path: Path):
    shard = sorted(shards.glob("*.safetensors"))[0]
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside of the directory"):
        open_checkpoint(shards)


def test_the_hubs_cache_is_made_of_links(shards: Path, tmp_path: Path):
    repository = tmp_path / "models--google--x"
    snapshot = repository / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(shards.iterdir())):
        blob = repository / f"blobs/{number}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert open_checkpoint(snapshot).kind == "huggingface"


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(content: str, shards: Path):
    (shards / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="is not an index of shards"):
        open_checkpoint(shards)


def test_other_dtypes_are_refused(tmp_path: Path, published: Path):
    path = Path(shutil.copytree(published / "huggingface", tmp_path / "copy"))
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data.replace(b'"BF16"', b'"I16" ', 1))
    with pytest.raises(CheckpointError, match="dtype       vision_tower.*: I16, model F32"):
        open_checkpoint(path)
