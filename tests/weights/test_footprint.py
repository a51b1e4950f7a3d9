"""Counts from the configuration alone are those of the model itself."""

import pytest

from paligemma_jax.config import VARIANTS
from paligemma_jax.models.paligemma import parameter_count
from paligemma_jax.weights.sidecar_files import (
    cache_bytes_per_token,
    parameter_counts,
    weight_bytes,
)


@pytest.mark.parametrize("name", ["paligemma-3b-pt-896", "paligemma2-10b-pt-224"])
def test_parts_add_up_to_the_model(name: str):
    counts = parameter_counts(VARIANTS[name])
    assert sum(counts.values()) == parameter_count(VARIANTS[name])
    assert set(counts) == {"image encoder", "projection", "token embeddings", "decoder layers"}


def test_bytes():
    config = VARIANTS["paligemma-3b-pt-224"]
    assert weight_bytes(config)["bfloat16"] == 2 * 2_923_335_408
    assert weight_bytes(config)["int4"] * 4 == weight_bytes(config)["bfloat16"]
    assert cache_bytes_per_token(config.llm, 16) == 2 * 18 * 1 * 256 * 2
