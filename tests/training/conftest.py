"""One tiny checkpoint for every test that trains."""

from pathlib import Path

import pytest

from tests.training.runs import write_tiny_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_store(tmp_path_factory.mktemp("tiny") / "store")
