"""A model on two devices gives the answers of one."""

import jax
import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.decode import generate, read_prefix
from paligemma_jax.generation.devices import by_rows, on_devices
from paligemma_jax.models.paligemma import PaliGemma
from tests.tiny import prompts


def test_two_devices_answer_as_one(tiny_model: PaliGemma):
    devices = jax.local_devices()[:2]
    both = on_devices(tiny_model, devices)
    batch = prompts([3, 5, 2, 4], 8)
    logits, cache = read_prefix(both, batch, room=16)
    assert {shard.data.shape[0] for shard in logits.addressable_shards} == {2}
    for leaf in jax.tree.leaves(cache):
        if leaf.ndim > 3:  # keys and values, not one of them whole on both devices
            assert not leaf.is_fully_replicated
    ours = generate(both, batch, max_new_tokens=6)
    theirs = generate(tiny_model, batch, max_new_tokens=6)
    assert [row.tokens for row in ours] == [row.tokens for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(row.logprobs, other.logprobs, rtol=1e-4, atol=1e-5)
    # A row alone cannot be split.
    alone = by_rows(both)(np.zeros((1, 3)))
    assert alone.is_fully_replicated and alone.sharding.device_set == set(devices)


def test_one_device_changes_nothing(tiny_model: PaliGemma):
    assert on_devices(tiny_model, jax.local_devices()[:1]) is tiny_model
    assert len(by_rows(tiny_model)(np.zeros(2)).sharding.device_set) == 1
    with pytest.raises(ConfigError, match="no devices"):
        on_devices(tiny_model, [])
