"""Decoding some tokens at a time gives what decoding in one go gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation import decode as loop
from paligemma_jax.generation.constraints import Constraint, forbid_tokens
from paligemma_jax.generation.decode import (
    DecodePlan,
    DecodeState,
    continue_decoding,
    prefill,
    start_decoding,
)
from paligemma_jax.generation.sampling import Greedy, Sampler, Temperature
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from tests.generation.answering import CAPACITY, NO_EOS, answer
from tests.tiny import SIGLIP, VOCAB, prompts

WARM = Temperature(temperature=2.0)
ROWS = 3


def start(
    model: PaliGemma,
    batch: Batch,
    sampler: Sampler,
    *,
    limit: int = CAPACITY,
    eos_id: int = NO_EOS,
    constraint: Constraint | None = None,
) -> DecodeState:
    """The state with one token a row."""
    inputs = [jnp.asarray(x) for x in (batch.images, batch.tokens, batch.mask_ar, batch.mask_input)]
    slots = SIGLIP.num_patches + batch.tokens.shape[1] + CAPACITY
    logits, cache = prefill(model, *inputs, slots=slots)
    seeds = jnp.arange(ROWS, dtype=jnp.uint32)
    plan = DecodePlan(seeds, jnp.asarray(limit), sampler, eos_id, constraint)
    return start_decoding(plan, cache, logits, jnp.ones(ROWS, bool), CAPACITY)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return prompts([2, 5, 3], 6)


@pytest.mark.parametrize("sampler", [Greedy(), WARM], ids=["greedy", "temperature"])
def test_in_pieces_as_in_one_go(tiny_model: PaliGemma, batch: Batch, sampler: Sampler):
    whole, logprobs, _ = answer(tiny_model, batch, sampler=sampler)
    for sizes in ([1] * 7, [3, 3, 3], [100]):
        state = start(tiny_model, batch, sampler)
        written = 1
        for size in sizes:
            assert not state.finished
            np.testing.assert_array_equal(state.progress.tokens[:, :written], whole[:, :written])
            assert not np.asarray(state.progress.tokens)[:, written:].any()
            state = continue_decoding(tiny_model, state, size)
            written = min(written + size, CAPACITY)
            assert int(state.progress.step) == written
        assert state.finished
        np.testing.assert_array_equal(state.progress.tokens, whole)
        np.testing.assert_allclose(state.progress.logprobs, logprobs, atol=1e-5)


def test_a_constraint_goes_on_where_it_was(tiny_model: PaliGemma, batch: Batch):
    some = forbid_tokens(range(3, 40), VOCAB)
    whole, _, _ = answer(tiny_model, batch, sampler=WARM, constraint=some)
    state = start(tiny_model, batch, WARM, constraint=some)
    while not state.finished:
        state = continue_decoding(tiny_model, state, 3)
    np.testing.assert_array_equal(state.progress.tokens, whole)


def test_ends_with_eos_and_at_the_limit(tiny_model: PaliGemma, batch: Batch):
    free, _, _ = answer(tiny_model, batch)
    state = start(tiny_model, batch, Greedy(), limit=3)
    state = continue_decoding(tiny_model, state, 8)
    assert state.finished and int(state.progress.step) == 3
    eos = int(free[0, 2])
    ended, _, _ = answer(tiny_model, batch, eos_id=eos)
    state = start(tiny_model, batch, Greedy(), eos_id=eos)
    for _ in range(4):
        state = continue_decoding(tiny_model, state, 2)
    np.testing.assert_array_equal(state.progress.tokens, ended)


def test_rows_that_are_ended_get_no_more_tokens(tiny_model: PaliGemma, batch: Batch):
    free, _, _ = answer(tiny_model, batch)
    state = continue_decoding(tiny_model, start(tiny_model, batch, Greedy()), 2)
    state = continue_decoding(tiny_model, state.end_rows(np.array([True, False, False])), 3)
    expected = free[:, :6].copy()
    expected[0, 3:] = 0
    np.testing.assert_array_equal(state.progress.tokens[:, :6], expected)
    state = state.end_rows(np.ones(ROWS, bool))
    assert state.finished
    after = continue_decoding(tiny_model, state, 3)
    assert int(after.progress.step) == int(state.progress.step)


def test_memory_is_reused_and_what_was_written_stays_readable(tiny_model: PaliGemma, batch: Batch):
    state = start(tiny_model, batch, Greedy())
    place = jax.tree.leaves(state.cache.layers)[0].unsafe_buffer_pointer()
    after = continue_decoding(tiny_model, state, 2)
    assert jax.tree.leaves(after.cache.layers)[0].unsafe_buffer_pointer() == place
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))
    assert np.asarray(state.progress.tokens)[:, 0].all()


def test_pieces_of_any_size_are_one_program(tiny_model: PaliGemma, batch: Batch):
    def programs() -> int:
        return sum(getattr(f, "_cache_size")() for f in (loop._start, loop._continue))  # noqa: B009

    other = Temperature(temperature=3.0)
    before = programs()
    state = start(tiny_model, batch, other)
    for size in (1, 2, 4):
        state = continue_decoding(tiny_model, state, size)
    start(tiny_model, batch, other, limit=3)
    assert programs() == before + 2
