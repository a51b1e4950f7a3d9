"""The decode loop: when it stops, what it returns, what it costs."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.decode import decode, prefill
from paligemma_jax.generation.sampling import Greedy, Temperature
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from tests.generation.answering import CAPACITY, answer, rows_of
from tests.goldens import assert_close
from tests.tiny import SIGLIP, prompts

LENGTHS = [2, 5, 3, 6]
WIDTH = 6
WARM = Temperature(temperature=2.0)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return prompts(LENGTHS, WIDTH)


@pytest.fixture(scope="module")
def path(tiny_model: PaliGemma, batch: Batch) -> np.ndarray:
    """Greedy tokens of a model that knows no end."""
    tokens, _, _ = answer(tiny_model, batch)
    assert len({tuple(row) for row in tokens}) == len(LENGTHS)  # rows answer differently
    return tokens


@pytest.fixture(scope="module")
def eos(path: np.ndarray) -> int:
    """A piece at which some rows end early, and others do not."""
    for piece in path[:, 1:].flat:
        places = [int((row == piece).argmax()) for row in path if piece in row]
        if len(places) < len(path) and min(places) > 0:
            return int(piece)
    raise AssertionError("every piece is in every row")


def test_a_row_ends_with_eos_and_is_zero_after(
    tiny_model: PaliGemma, batch: Batch, path: np.ndarray, eos: int
):
    tokens, logprobs, _ = answer(tiny_model, batch, eos_id=eos)
    ended = np.cumsum(path == eos, axis=1) - (path == eos) > 0
    assert ended.any() and not ended.all(axis=1).any()
    np.testing.assert_array_equal(tokens, np.where(ended, 0, path))
    assert (logprobs[ended] == 0).all() and (logprobs[~ended] < 0).all()


def test_stops_when_every_row_has_ended(
    tiny_model: PaliGemma, batch: Batch, path: np.ndarray, eos: int
):
    """The cache grows by a slot a step: the last token is not read any more."""
    ending = [eos in row for row in path]
    last = max(int((row == eos).argmax()) for row in path if eos in row)
    _, _, cache = answer(tiny_model, batch, eos_id=eos, row_mask=ending)
    assert int(cache.length) == SIGLIP.num_patches + WIDTH + last
    _, _, cache = answer(tiny_model, batch, eos_id=eos)
    assert int(cache.length) == SIGLIP.num_patches + WIDTH + CAPACITY - 1


def test_eos_as_the_first_token(tiny_model: PaliGemma, batch: Batch, path: np.ndarray):
    alone = rows_of(batch, [0])
    tokens, logprobs, cache = answer(tiny_model, alone, eos_id=int(path[0, 0]))
    np.testing.assert_array_equal(tokens, [[path[0, 0]] + [0] * (CAPACITY - 1)])
    assert logprobs[0, 0] < 0 and int(cache.length) == SIGLIP.num_patches + WIDTH


@pytest.mark.parametrize("limit", [1, 3])
def test_limit(tiny_model: PaliGemma, batch: Batch, path: np.ndarray, limit: int):
    tokens, logprobs, _ = answer(tiny_model, batch, limit=limit)
    np.testing.assert_array_equal(tokens[:, :limit], path[:, :limit])
    assert not tokens[:, limit:].any() and not logprobs[:, limit:].any()


def test_rows_that_fill_the_batch_stay_zero(tiny_model: PaliGemma, batch: Batch, path: np.ndarray):
    real = np.array([True, False, True, False])
    tokens, logprobs, _ = answer(tiny_model, batch, row_mask=[bool(x) for x in real])
    np.testing.assert_array_equal(tokens, np.where(real[:, None], path, 0))
    assert not logprobs[~real].any()


def test_order_of_the_batch_changes_nothing(tiny_model: PaliGemma, batch: Batch, path: np.ndarray):
    tokens, _, _ = answer(tiny_model, rows_of(batch, [3, 2, 1, 0]))
    np.testing.assert_array_equal(tokens[::-1], path)


def test_a_row_alone_answers_as_in_a_ragged_batch(
    tiny_model: PaliGemma, batch: Batch, path: np.ndarray
):
    _, logprobs, _ = answer(tiny_model, batch)
    for row in range(len(LENGTHS)):
        alone, alone_logprobs, _ = answer(tiny_model, rows_of(batch, [row]))
        np.testing.assert_array_equal(alone[0], path[row])
        assert_close(alone_logprobs[0], logprobs[row], atol=1e-5)


def test_padding_changes_nothing(tiny_model: PaliGemma, batch: Batch, path: np.ndarray):
    extra = ((0, 0), (0, 5))
    wider = Batch(
        images=batch.images,
        tokens=np.pad(batch.tokens, extra),
        mask_ar=np.pad(batch.mask_ar, extra, constant_values=1),
        mask_input=np.pad(batch.mask_input, extra),
    )
    np.testing.assert_array_equal(answer(tiny_model, wider)[0], path)


@pytest.mark.parametrize("sampler", [Greedy(), WARM], ids=["greedy", "temperature"])
def test_logprobs_are_those_of_the_model(
    tiny_model: PaliGemma, batch: Batch, sampler: Greedy | Temperature
):
    """Of the distribution without temperature, found by one forward pass over the answer."""
    row, length = 1, LENGTHS[1]
    tokens, logprobs, _ = answer(tiny_model, batch, sampler=sampler)
    text = np.concatenate([batch.tokens[row, :length], tokens[row]])[None]
    mask_ar = (np.arange(text.shape[1]) >= length).astype(np.int32)[None]
    forward = jax.jit(lambda model, *inputs: model(*inputs))
    inputs = [jnp.asarray(x) for x in (rows_of(batch, [row]).images, text, mask_ar)]
    logits = forward(tiny_model, *inputs)[0, length - 1 : -1]
    wanted = jax.nn.log_softmax(logits)[jnp.arange(CAPACITY), tokens[row]]
    assert_close(logprobs[row], wanted)


def test_draws_depend_on_the_seed_alone(tiny_model: PaliGemma, batch: Batch):
    """Neither on the row's place nor on what else is in the batch."""
    together, _, _ = answer(tiny_model, batch, sampler=WARM, seeds=[7, 8, 9, 10])
    again, _, _ = answer(tiny_model, batch, sampler=WARM, seeds=[7, 8, 9, 10])
    np.testing.assert_array_equal(together, again)
    moved, _, _ = answer(tiny_model, rows_of(batch, [2, 1, 1, 0]), sampler=WARM, seeds=[9, 8, 0, 7])
    np.testing.assert_array_equal(moved[[3, 1, 0]], together[[0, 1, 2]])


def test_seeds_differ(tiny_model: PaliGemma, batch: Batch):
    same = rows_of(batch, [1, 1, 1, 1])
    tokens, _, _ = answer(tiny_model, same, sampler=WARM, seeds=[0, 1, 2, 1])
    assert len({tuple(row) for row in tokens}) == 3
    np.testing.assert_array_equal(tokens[1], tokens[3])


def test_steps_draw_afresh(tiny_model: PaliGemma, batch: Batch):
    """With the same draw at every step a hot sampler would repeat one piece."""
    tokens, _, _ = answer(tiny_model, batch, sampler=Temperature(temperature=1e4))
    assert all(len(set(row)) > CAPACITY // 2 for row in tokens)


def test_cold_sampling_is_greedy(tiny_model: PaliGemma, batch: Batch, path: np.ndarray):
    tokens, _, _ = answer(tiny_model, batch, sampler=Temperature(temperature=1e-4))
    np.testing.assert_array_equal(tokens, path)


def test_the_cache_is_donated(tiny_model: PaliGemma, batch: Batch):
    """Decoding writes into the memory of prefill's cache instead of a copy."""
    inputs = [jnp.asarray(x) for x in (batch.images, batch.tokens, batch.mask_ar, batch.mask_input)]
    logits, cache = prefill(tiny_model, *inputs, slots=SIGLIP.num_patches + WIDTH + CAPACITY)
    place = jax.tree.leaves(cache.layers)[0].unsafe_buffer_pointer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns of a donation it cannot use
        rows, seeds = jnp.ones(4, bool), jnp.zeros(4, jnp.uint32)
        limit = jnp.asarray(CAPACITY, jnp.int32)
        _, _, after, _ = decode(
            tiny_model, cache, logits, rows, seeds, limit, Greedy(), CAPACITY, eos_id=-1
        )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((cache.layers, cache.valid)))
    assert jax.tree.leaves(after.layers)[0].unsafe_buffer_pointer() == place
    assert not logits.is_deleted()


def test_different_prompts_compile_once(tiny_model: PaliGemma):
    """Lengths, texts, images, seeds, limits and empty rows are data, not programs."""

    def programs() -> int:
        return sum(getattr(f, "_cache_size")() for f in (prefill, decode))  # noqa: B009

    def ask(seed: int, lengths: list[int], real: list[bool]) -> None:
        answer(
            tiny_model,
            prompts(lengths, 9, seed=seed),
            sampler=WARM,
            seeds=[seed, seed + 5, 0],
            row_mask=real,
            limit=1 + seed % CAPACITY,
        )

    before = programs()
    ask(0, [9, 1, 4], [True, True, True])
    assert programs() == before + 2
    for seed in range(1, 6):
        ask(seed, [seed, 9 - seed, 1 + seed], [True, seed % 2 == 0, False])
    assert programs() == before + 2
