"""Tiny checkpoints in every format. Golden files: outputs of the original implementations."""

import dataclasses
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from paligemma_jax.config import GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.weights.safetensors_io import write_tensors
from paligemma_jax.weights.tensors import BFLOAT16, as_float_dtype

TESTS = Path(__file__).parents[1]
PIECES = 1600  # bytes, ASCII, <loc> and <seg>, and some filler


@pytest.fixture(scope="session")
def golden() -> Path:
    return TESTS / "golden"


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """The writer of random-weight checkpoints that the full-size tests use."""
    from tests.fullsize import synthetic

    return synthetic


@pytest.fixture(scope="session")
def pg2() -> PaliGemmaConfig:
    """A PaliGemma 2 whose heads times head_dim is not its width."""
    return PaliGemmaConfig(
        img=SigLIPConfig(image_size=28, width=12, depth=2, mlp_dim=20, num_heads=3),
        llm=GemmaConfig(
            width=16,
            depth=2,
            mlp_dim=24,
            num_heads=4,
            num_kv_heads=2,
            head_dim=6,
            query_scale=6**-0.5,
            vocab_size=PIECES,
            post_norms=True,
            attn_logit_softcap=50.0,
            final_logit_softcap=30.0,
        ),
    )


@pytest.fixture(scope="session")
def pg1(pg2: PaliGemmaConfig) -> PaliGemmaConfig:
    llm = GemmaConfig(
        width=16,
        depth=2,
        mlp_dim=24,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        query_scale=8**-0.5,
        vocab_size=PIECES,
    )
    return dataclasses.replace(pg2, llm=llm)


@pytest.fixture(scope="session")
def tokenizer(synthetic: ModuleType) -> bytes:
    return synthetic.make_tokenizer(PIECES)


@pytest.fixture(scope="session")
def published(
    tmp_path_factory: pytest.TempPathFactory,
    synthetic: ModuleType,
    pg2: PaliGemmaConfig,
    tokenizer: bytes,
) -> Path:
    """`model.npz` and `huggingface/` with equal bfloat16 weights and a tokenizer; do not change."""
    root = tmp_path_factory.mktemp("published")
    synthetic.write_big_vision(root / "model.npz", pg2)
    synthetic.write_hugging_face(root / "huggingface", pg2)
    for directory in (root, root / "huggingface"):
        (directory / "tokenizer.model").write_bytes(tokenizer)
    return root


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., Path]:
    """Writes arrays, bfloat16 as 2-byte void, to an npz; a list of pairs may repeat a name."""

    def write(arrays: Mapping[str, np.ndarray] | list, name: str = "model.npz") -> Path:
        path = tmp_path / name
        pairs = arrays.items() if isinstance(arrays, Mapping) else arrays
        with zipfile.ZipFile(path, "w") as archive:
            for key, array in pairs:
                buffer = io.BytesIO()
                raw = array.view("V2") if array.dtype == BFLOAT16 else array
                np.save(buffer, raw, allow_pickle=True)
                archive.writestr(f"{key}.npy", buffer.getvalue())
        return path

    return write


@pytest.fixture
def safetensors() -> Callable[[Path, Mapping[str, np.ndarray]], None]:
    """Writes float32 tensors to a safetensors file."""

    def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
        write_tensors(path, {name: np.asarray(a, np.float32) for name, a in tensors.items()})

    return write


@pytest.fixture
def edit_json() -> Callable[[Path], "Edit"]:
    return Edit


class Edit:
    """`with edit_json(path) as values:` changes a JSON file."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> dict:
        self.values = json.loads(self.path.read_text())
        return self.values

    def __exit__(self, *exception: object) -> None:
        self.path.write_text(json.dumps(self.values))


@pytest.fixture
def all_arrays() -> Callable[..., dict[str, np.ndarray]]:
    """Every parameter of a checkpoint as numpy arrays by path."""
    from paligemma_jax.weights.checkpoint import open_checkpoint

    def read(path: Path, dtype: str | None = None, **options: Any) -> dict[str, np.ndarray]:
        with open_checkpoint(path, **options) as checkpoint:
            wanted = None if dtype is None else as_float_dtype(dtype)
            return {
                name: checkpoint.read(name, wanted or spec.dtype)
                for name, spec in checkpoint.specs.items()
            }

    return read


@pytest.fixture
def flip() -> Iterator[Callable[[Path, int], None]]:
    """Flips one bit of a file."""

    def change(path: Path, position: int) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 0x10
        path.write_bytes(data)

    yield change
