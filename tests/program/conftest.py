"""The GPU to compile for; without jax's CUDA plugin what needs it is skipped."""

import pytest

from tests.program.target import Target, why_not


@pytest.fixture(scope="session")
def h200() -> Target:
    missing = why_not()
    if missing:
        pytest.skip(f"{missing}; see tests/program/requirements.txt")
    return Target()
