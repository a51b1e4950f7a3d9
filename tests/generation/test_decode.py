"""The decode loop: when it stops, what it returns, how it is resumed, what it costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.decode import (
    continue_decoding,
    decode_steps,
    prefill,
    start_decoding,
    start_progress,
)
from paligemma_jax.generation.sampling import Greedy, Sampler, Temperature
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from tests.generation.decoding import (
    CAPACITY,
    decode_all,
    padded,
    plan_of,
    programs,
    read,
    sequences_of,
    start,
)
from tests.goldens import (
    BIG_VISION,
    EOS,
    HUGGING_FACE,
    assert_close,
    big_vision,
    hugging_face,
    hugging_face_images,
    hugging_face_rows,
    optimized,
    prompt,
    until_eos,
)
from tests.tiny import SIGLIP, prompts

LENGTHS = [2, 5, 3, 6]
WIDTH = 6
WARM = Temperature(temperature=2.0)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return prompts(LENGTHS, WIDTH)


@pytest.fixture(scope="module")
def path(tiny_model: PaliGemma, batch: Batch) -> np.ndarray:
    """Greedy tokens of sequences without end."""
    tokens, _, _ = decode_all(tiny_model, batch)
    assert len({tuple(row) for row in tokens}) == len(LENGTHS)
    return tokens


@pytest.fixture(scope="module")
def eos(path: np.ndarray) -> int:
    """A token at which some sequences end early, and others do not."""
    for token in path[:, 1:].flat:
        places = [int((row == token).argmax()) for row in path if token in row]
        if len(places) < len(path) and min(places) > 0:
            return int(token)
    raise AssertionError("every token is in every sequence")


def test_a_sequence_ends_with_eos_and_is_zero_after(tiny_model, batch, path, eos):
    tokens, logprobs, _ = decode_all(tiny_model, batch, eos=eos)
    ended = np.cumsum(path == eos, axis=1) - (path == eos) > 0
    assert ended.any() and not ended.all(axis=1).any()
    np.testing.assert_array_equal(tokens, np.where(ended, 0, path))
    assert (logprobs[ended] == 0).all() and (logprobs[~ended] < 0).all()


def test_stops_when_every_sequence_has_ended(tiny_model, batch, path, eos):
    """The cache grows by a slot a step: the last token is not read any more."""
    ending = [eos in row for row in path]
    last = max(int((row == eos).argmax()) for row in path if eos in row)
    _, _, cache = decode_all(tiny_model, batch, ending, eos=eos)
    assert int(cache.length) == SIGLIP.num_patches + WIDTH + last
    _, _, cache = decode_all(tiny_model, batch, eos=eos)
    assert int(cache.length) == SIGLIP.num_patches + WIDTH + CAPACITY - 1
    alone = sequences_of(batch, [0])
    tokens, _, cache = decode_all(tiny_model, alone, eos=int(path[0, 0]))
    assert int(cache.length) == SIGLIP.num_patches + WIDTH and not tokens[0, 1:].any()


def test_each_sequence_has_its_own_limit_least_length_and_ends(tiny_model, batch, path):
    """In one program, and as with the same values for all."""
    ends = [[int(path[0, 3]), -1], [-1, -1], [int(path[2, 1]), int(path[2, 4])], [-1, -1]]
    plan = dataclasses.replace(
        plan_of(4),
        max_new_tokens=jnp.asarray([8, 3, 8, 1]),
        min_new_tokens=jnp.asarray([0, 0, 3, 0]),
        eos_ids=jnp.asarray(ends),
    )
    logits, cache = read(tiny_model, batch)
    state = continue_decoding(tiny_model, _started(plan, logits, cache), CAPACITY)
    tokens = np.asarray(state.progress.tokens)
    np.testing.assert_array_equal(tokens[0], [*path[0, :4], *[0] * 4])
    np.testing.assert_array_equal(tokens[1], [*path[1, :3], *[0] * 5])
    assert tokens[3].tolist() == [path[3, 0], *[0] * 7]
    assert not set(ends[2]) & set(tokens[2, :3].tolist())


def _started(plan, logits, cache):
    return start_decoding(plan, cache, logits, jnp.ones(len(logits), bool), CAPACITY)


def test_filler_order_and_padding_change_nothing(tiny_model, batch, path):
    real = np.array([True, False, True, False])
    tokens, logprobs, _ = decode_all(tiny_model, batch, real.tolist())
    np.testing.assert_array_equal(tokens, np.where(real[:, None], path, 0))
    assert not logprobs[~real].any()
    tokens, _, _ = decode_all(tiny_model, sequences_of(batch, [3, 2, 1, 0]))
    np.testing.assert_array_equal(tokens[::-1], path)
    np.testing.assert_array_equal(decode_all(tiny_model, padded(batch, 5))[0], path)


def test_a_sequence_alone_is_decoded_as_in_a_ragged_batch(tiny_model, batch, path):
    _, logprobs, _ = decode_all(tiny_model, batch)
    for i in range(len(LENGTHS)):
        alone, alone_logprobs, _ = decode_all(tiny_model, sequences_of(batch, [i]))
        np.testing.assert_array_equal(alone[0], path[i])
        assert_close(alone_logprobs[0], logprobs[i], atol=1e-5)


@pytest.mark.parametrize("sampler", [Greedy(), WARM], ids=["greedy", "temperature"])
def test_logprobs_are_those_of_the_model(tiny_model, batch, sampler: Sampler):
    """Of the distribution without temperature, found by one forward pass over the sequence."""
    i, length = 1, LENGTHS[1]
    tokens, logprobs, _ = decode_all(tiny_model, batch, sampler=sampler)
    text = np.concatenate([batch.tokens[i, :length], tokens[i]])[None]
    mask_ar = (np.arange(text.shape[1]) >= length).astype(np.int32)[None]
    forward = jax.jit(lambda model, *inputs: model(*inputs))
    inputs = [jnp.asarray(x) for x in (sequences_of(batch, [i]).images, text, mask_ar)]
    logits = forward(tiny_model, *inputs)[0, length - 1 : -1]
    assert_close(logprobs[i], jax.nn.log_softmax(logits)[jnp.arange(CAPACITY), tokens[i]])


def test_samples_depend_on_the_seed_alone(tiny_model, batch):
    """Neither on the place in the batch nor on what else is in it; every step samples afresh."""
    together, _, _ = decode_all(tiny_model, batch, sampler=WARM, seeds=[7, 8, 9, 10])
    moved, _, _ = decode_all(
        tiny_model, sequences_of(batch, [2, 1, 1, 0]), sampler=WARM, seeds=[9, 8, 0, 7]
    )
    np.testing.assert_array_equal(moved[[3, 1, 0]], together[[0, 1, 2]])
    same = sequences_of(batch, [1, 1, 1, 1])
    tokens, _, _ = decode_all(tiny_model, same, sampler=WARM, seeds=[0, 1, 2, 1])
    assert len({tuple(row) for row in tokens}) == 3
    np.testing.assert_array_equal(tokens[1], tokens[3])
    flat = jnp.zeros((4, 64))
    plan = plan_of(4, sampler=WARM)
    drawn = [np.asarray(plan.sampler(flat, plan.keys(jnp.asarray(step)))) for step in range(3)]
    assert len({tuple(row) for row in np.stack(drawn).tolist()}) == 3


def test_prompts_seeds_and_settings_compile_once(tiny_model):
    before = programs(prefill, start_progress, decode_steps)
    for seed in range(5):
        decode_all(
            tiny_model,
            prompts([9 - seed, 1 + seed, 4], 9, seed=seed),
            [True, seed % 2 == 0, True],
            sampler=Temperature(temperature=2.0 + seed),
            seeds=[seed, seed + 5, 0],
            limit=1 + seed % CAPACITY,
            eos=seed,
        )
    assert programs(prefill, start_progress, decode_steps) == before + 3


@pytest.mark.parametrize("sampler", [Greedy(), WARM], ids=["greedy", "temperature"])
def test_in_pieces_as_in_one_go(tiny_model, batch, sampler: Sampler):
    whole, logprobs, _ = decode_all(tiny_model, batch, sampler=sampler)
    for sizes in ([1] * 7, [3, 3, 3], [100]):
        state = start(tiny_model, batch, sampler=sampler)
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
        np.testing.assert_allclose(state.progress.record.logprob, logprobs, atol=1e-5)


def test_sequences_that_are_ended_get_no_more_tokens(tiny_model, batch, path):
    state = continue_decoding(tiny_model, start(tiny_model, batch), 2)
    state = continue_decoding(tiny_model, state.end(np.array([True, False, False, False])), 3)
    expected = path[:, :6].copy()
    expected[0, 3:] = 0
    np.testing.assert_array_equal(state.progress.tokens[:, :6], expected)
    state = state.end(np.ones(4, bool))
    assert state.finished
    after = continue_decoding(tiny_model, state, 3)
    assert int(after.progress.step) == int(state.progress.step)


def test_memory_is_reused_and_what_was_written_stays_readable(tiny_model, batch):
    state = start(tiny_model, batch)
    place = jax.tree.leaves(state.cache.k)[0].unsafe_buffer_pointer()
    after = continue_decoding(tiny_model, state, 2)
    assert jax.tree.leaves(after.cache.k)[0].unsafe_buffer_pointer() == place
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))
    assert np.asarray(state.progress.tokens)[:, 0].all()


def greedy(model: PaliGemma, logits: jax.Array, cache) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities of 8 steps."""
    state = _started(plan_of(len(logits), eos=EOS), logits, cache)
    progress = continue_decoding(model, state, CAPACITY).progress
    return np.asarray(progress.tokens), np.asarray(progress.record.logprob)


@pytest.mark.parametrize("name", BIG_VISION)
def test_big_vision(name: str):
    """big_vision leaves the first token's logits uncapped, here a second model imitates that."""
    golden = big_vision(name)
    model = golden.model(final_logit_softcap=0.0)
    capped = golden.model(final_logit_softcap=30.0 if name == "pg2_softcap" else 0.0)
    images, tokens, *masks = prompt(golden)
    with optimized():
        slots = images.shape[1] * model.config.img.num_patches + tokens.shape[1] + CAPACITY
        state = prefill(model, images, tokens, *masks, slots)
    tokens, logprobs = greedy(capped, *state)
    kept = until_eos(golden["greedy_tokens"])
    np.testing.assert_array_equal(tokens, np.where(kept, golden["greedy_tokens"], 0))
    assert_close(logprobs, np.where(kept, golden["greedy_logp"], 0), golden.atol)


def hugging_face_tokens(golden, model: PaliGemma) -> np.ndarray:
    images = jnp.asarray(hugging_face_images(golden)[:, None])
    rows = hugging_face_rows(golden, golden["batch_ids"], golden["batch_mask"])
    slots = model.config.img.num_patches + rows[0].shape[1] + CAPACITY
    return greedy(model, *prefill(model, images, *map(jnp.asarray, rows), slots))[0]


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name: str):
    """A left-padded batch, whose first prompt was also answered alone."""
    golden = hugging_face(name)
    model = golden.model(sliding_window=6 if name == "pg2_sw" else None)
    tokens, expected = hugging_face_tokens(golden, model), golden["batch_greedy_real"]
    np.testing.assert_array_equal(tokens, np.where(until_eos(expected), expected, 0))
    np.testing.assert_array_equal(tokens[0], golden["greedy_real"][0])


def test_hugging_face_without_the_window():
    """pg2_sw has pg2's weights: without its window it answers as pg2 does."""
    sliding, plain = hugging_face("pg2_sw"), hugging_face("pg2")
    tokens = hugging_face_tokens(sliding, sliding.model())
    np.testing.assert_array_equal(tokens, plain["batch_greedy_real"])
    assert (tokens != sliding["batch_greedy_real"]).any()
