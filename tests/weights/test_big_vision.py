"""big_vision's npz files: as published, and damaged or hostile ones."""

import dataclasses
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from paligemma_jax.config import GEMMA2_27B, VARIANTS, PaliGemmaConfig
from paligemma_jax.errors import CheckpointError
from paligemma_jax.weights.big_vision import big_vision_name, infer_config
from paligemma_jax.weights.checkpoint import open_checkpoint
from paligemma_jax.weights.tensors import BFLOAT16, expected_shapes

# Hyperparameters of the golden checkpoints (their `meta`) that shapes tell.
GOLDEN = {
    "pg1": dict(width=48, depth=2, mlp_dim=96, num_heads=4, num_kv_heads=1, head_dim=16),
    "pg2": dict(width=48, depth=3, mlp_dim=80, num_heads=4, num_kv_heads=2, head_dim=16),
    "pg2_softcap": dict(width=48, depth=3, mlp_dim=80, num_heads=4, num_kv_heads=2, head_dim=16),
    "pg2_28b": dict(width=64, depth=2, mlp_dim=96, num_heads=4, num_kv_heads=2, head_dim=8),
    "pg1_multi": dict(width=48, depth=2, mlp_dim=96, num_heads=4, num_kv_heads=1, head_dim=16),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_checkpoints(name: str, golden: Path):
    path = golden / f"big_vision/{name}.params.npz"
    with open_checkpoint(path) as checkpoint:
        llm = checkpoint.config.llm
        assert {key: getattr(llm, key) for key in GOLDEN[name]} == GOLDEN[name]
        assert llm.vocab_size == 320 and llm.tie_embeddings
        assert llm.post_norms == name.startswith("pg2")
        assert llm.attn_logit_softcap == (50.0 if llm.post_norms else 0.0)
        assert llm.final_logit_softcap == 0.0 and llm.sliding_window is None
        img = checkpoint.config.img
        side = 42 if name == "pg2" else 28
        assert (img.image_size, img.patch_size, img.num_heads) == (side, 14, 4)
        with np.load(path) as stored:
            tensors = {n: checkpoint.read(n, s.dtype) for n, s in checkpoint.specs.items()}
            assert len(tensors) == len(stored.files)
            for ours, array in tensors.items():
                theirs = stored[f"params/{big_vision_name(ours)}"]
                assert array.dtype == np.float32  # the files hold some arrays as float64
                np.testing.assert_array_equal(array, theirs.astype(np.float32))


@pytest.mark.parametrize(
    "name", ["paligemma-3b-pt-224", *(f"paligemma2-{s}b-pt-448" for s in (3, 10, 28))]
)
def test_published_configurations_follow_from_the_shapes(name: str):
    config = VARIANTS[name]
    shapes = {big_vision_name(n): shape for n, shape in expected_shapes(config).items()}
    inferred = infer_config(shapes, Path("x.npz"))
    assert dataclasses.replace(inferred, text_length=config.text_length) == config
    assert GEMMA2_27B.query_scale == 144**-0.5


@pytest.mark.parametrize("prefix", ["params/", "", "opt/target/"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_prefixes_and_dtypes(prefix: str, dtype: str, published: Path, all_arrays, npz):
    arrays = all_arrays(published / "model.npz", dtype)
    path = npz({prefix + big_vision_name(name): array for name, array in arrays.items()})
    again = all_arrays(path)
    assert again.keys() == arrays.keys()
    for name, array in arrays.items():
        assert again[name].dtype == dtype
        assert again[name].tobytes() == array.tobytes()


def test_casting_while_reading(published: Path, all_arrays):
    stored = all_arrays(published / "model.npz")
    for name, array in all_arrays(published / "model.npz", "float32").items():
        assert stored[name].dtype == BFLOAT16 and array.dtype == np.float32
        np.testing.assert_array_equal(array, stored[name].astype(np.float32))


def test_fortran_order(published: Path, all_arrays, npz):
    arrays = all_arrays(published / "model.npz", "float32")
    stored = {big_vision_name(n): np.asfortranarray(array) for n, array in arrays.items()}
    for name, array in all_arrays(npz(stored)).items():
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("first", [0, 1])
def test_parts_are_one_file(first: int, published: Path, tmp_path: Path, all_arrays):
    data = (published / "model.npz").read_bytes()
    size = len(data) // 11
    parts = []
    for number in range(12):  # more than ten, so that names sort differently from numbers
        part = tmp_path / f"big.npz.part{number + first}"
        part.write_bytes(data[number * size : (number + 1) * size if number < 11 else None])
        parts.append(part)
    whole = all_arrays(published / "model.npz")
    for path in (tmp_path / "big.npz", parts[3], tmp_path):
        again = all_arrays(path)
        assert all(again[name].tobytes() == array.tobytes() for name, array in whole.items())
    parts[4].unlink()
    with pytest.raises(CheckpointError, match=f"lacks its part {4 + first} of"):
        open_checkpoint(tmp_path / "big.npz")
    parts[4].write_bytes(data[4 * size : 5 * size])
    parts[11].unlink()
    with pytest.raises(CheckpointError, match="truncated.*or its last part is missing"):
        open_checkpoint(tmp_path / "big.npz")


def test_every_misfit_is_named(published: Path, all_arrays, npz):
    arrays = {big_vision_name(n): a for n, a in all_arrays(published / "model.npz").items()}
    del arrays["img/head/bias"]
    arrays["llm/layers/extra"] = np.zeros(3, np.float32)
    arrays["img/pos_embedding"] = np.zeros((4, 12), np.float32)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(npz(arrays))
    assert "(3 problems)" in str(error.value)
    assert "missing     img/head/bias" in str(error.value)
    assert "unexpected  llm/layers/extra" in str(error.value)
    assert "shape       img/pos_embedding: checkpoint (4, 12), model 3 dim" in str(error.value)
    arrays["img/head/bias"] = np.zeros(17, np.float32)
    del arrays["llm/layers/extra"]
    arrays["img/pos_embedding"] = np.zeros((1, 4, 12), np.int8)
    with pytest.raises(CheckpointError, match=r"img/head/bias: checkpoint \(17,\), model \(16,\)"):
        open_checkpoint(npz(arrays))
    arrays["img/head/bias"] = np.zeros(16, np.float32)
    with pytest.raises(CheckpointError, match="dtype       img/pos_embedding: int8"):
        open_checkpoint(npz(arrays))


def test_positions_must_form_a_square(published: Path, all_arrays, npz):
    arrays = {big_vision_name(n): a for n, a in all_arrays(published / "model.npz").items()}
    arrays["img/pos_embedding"] = np.zeros((1, 5, 12), np.float32)
    with pytest.raises(CheckpointError, match="5 position embeddings are not a square"):
        open_checkpoint(npz(arrays))


def test_a_given_config_must_fit(published: Path, pg2: PaliGemmaConfig):
    given = dataclasses.replace(
        pg2, llm=dataclasses.replace(pg2.llm, query_scale=0.5, final_logit_softcap=7.0)
    )
    assert open_checkpoint(published / "model.npz", config=given).config == given
    img = dataclasses.replace(pg2.img, image_size=42)
    with pytest.raises(CheckpointError, match=r"img/pos_embedding: checkpoint \(1, 4, 12\), model"):
        open_checkpoint(published / "model.npz", config=dataclasses.replace(pg2, img=img))


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
