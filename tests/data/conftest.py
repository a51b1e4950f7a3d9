"""Shared by the tests of data: a tiny processor, pictures on disk, and layouts as published."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paligemma_jax.processing.image import ImagePreprocessing
from paligemma_jax.processing.processor import Processor
from paligemma_jax.processing.tokenizer import Tokenizer

MODEL = Path(__file__).parents[1] / "golden" / "processing" / "tiny_paligemma.model"
CAT = "<loc0102><loc0204><loc0511><loc0613> cat"
DOG = "<loc0600><loc0000><loc1023><loc0300> dog"


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor(Tokenizer.from_file(MODEL), ImagePreprocessing(size=8))


@pytest.fixture(scope="session")
def write_picture() -> Callable[..., Path]:
    """Writes a PNG of random blocks; returns its path."""

    def write(path: Path, width: int = 20, height: int = 10, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write


@pytest.fixture(scope="session")
def write_lines() -> Callable[[Path, Sequence[Any]], Path]:
    """Writes JSON lines; a str is written as it is."""

    def write(path: Path, rows: Sequence[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
