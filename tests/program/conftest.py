"""The GPU to compile for; without jax's CUDA plugin what needs it is skipped."""

from collections.abc import Iterator

import jaxtyping
import pytest

from tests.program.target import Target, why_not


@pytest.fixture(scope="session")
def h200() -> Target:
    missing = why_not()
    if missing:
        pytest.skip(f"{missing}; see tests/program/requirements.txt")
    return Target()


@pytest.fixture(autouse=True)
def _shapes_may_stand_for_arrays() -> Iterator[None]:
    """Annotations, which the other tests check, know arrays only."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
