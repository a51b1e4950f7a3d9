"""Errors reach the process that asked, whichever they were raised in."""

import pickle

import pytest

from paligemma_jax import errors
from paligemma_jax.errors import MissingExtraError, PaliGemmaError


@pytest.mark.parametrize(
    "kind",
    [
        k
        for k in vars(errors).values()
        if getattr(k, "__module__", "") == errors.__name__ and isinstance(k, type)
    ],
)
def test_they_travel_between_processes(kind: type[PaliGemmaError]):
    error = kind("Video", "video") if kind is MissingExtraError else kind("what does not fit")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error)
