"""Shared by the tests of data: a tiny processor, sources that workers can import, files on disk."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.data.batches import Batches, make_batches
from paligemma_jax.data.record import Record
from paligemma_jax.errors import DatasetError
from paligemma_jax.processing.image import ImagePreprocessing
from paligemma_jax.processing.masks import MaskCodec
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import Tokenizer

MODEL = Path(__file__).parents[1] / "golden" / "processing" / "tiny_paligemma.model"
CAT = "<loc0102><loc0204><loc0511><loc0613> cat"
DOG = "<loc0600><loc0000><loc1023><loc0300> dog"
CODES = "".join(f"<seg{i:03d}>" for i in range(16))
PIXELS = np.zeros((10, 20, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Record i has a gray image of value i and the answer "i"; those in `bad` are damaged."""

    count: int
    bad: tuple[int, ...] = ()
    name: str = "numbers"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        if index in self.bad:
            raise DatasetError(f"{self.name}:{index}: it is damaged.")
        image = np.full((4, 6, 3), index, np.uint8)
        return Record((image,), "caption en", f"{index}", f"{self.name}:{index}")


def add_digit(record: Record, rng: np.random.Generator) -> Record:
    """Adds a random digit to the answer."""
    return dataclasses.replace(record, suffix=f"{record.suffix} {rng.integers(10)}")


class FakeCodec(MaskCodec):
    """Codes are all sevens, and masks fill their boxes; counts the masks it encodes."""

    def __init__(self):
        super().__init__(None)  # pyright: ignore[reportArgumentType]
        object.__setattr__(self, "counts", [])

    def encode(self, crops: np.ndarray) -> np.ndarray:
        self.counts.append(len(crops))  # pyright: ignore[reportAttributeAccessIssue]
        return np.full((len(crops), 16), 7, np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.ones((len(codes), 64, 64), np.float32)


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor(Tokenizer.from_file(MODEL), ImagePreprocessing(size=8))


@pytest.fixture
def make(processor: Processor, request: pytest.FixtureRequest) -> Callable[..., Batches]:
    """`make_batches` with small settings, closed after the test."""
    pytest.importorskip("grain", reason='needs the extra "data"')

    def make(source: Any = None, **changes: Any) -> Batches:
        settings: dict[str, Any] = {"batch_size": 4, "length": 12, "seed": 1, **changes}
        batches = make_batches(Numbers(10) if source is None else source, processor, **settings)
        request.addfinalizer(batches.close)
        return batches

    return make


@pytest.fixture(scope="session")
def write_image() -> Callable[..., Path]:
    """Writes a PNG of random pixels; returns its path."""

    def write(path: Path, width: int = 20, height: int = 10, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write


@pytest.fixture(scope="session")
def write_lines() -> Callable[[Path, Sequence[Any]], Path]:
    """Writes JSON lines; a str is written as it is."""

    def write(path: Path, examples: Sequence[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [one if isinstance(one, str) else json.dumps(one) for one in examples]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
