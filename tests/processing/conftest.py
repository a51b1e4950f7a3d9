"""Shared by the tests of processing: the tiny tokenizer and where the golden files are."""

from pathlib import Path

import pytest

from paligemma_jax.processing.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "processing"


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(GOLDEN / "tiny_paligemma.model")
