"""Log-probabilities of given answers: exact, in few programs, cheaper than one by one; labels."""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.config import GemmaConfig
from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.generation import scoring as packing
from paligemma_jax.generation.decode import prefill, read_prompts
from paligemma_jax.generation.generate import generate
from paligemma_jax.generation.scoring import ScoredAnswer, classify, packed_logprobs, score_tokens
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from tests.generation.decoding import sequences_of
from tests.goldens import assert_close, big_vision, optimized, prompt
from tests.tiny import EOS, GEMMA, GEMMA2, prompts, random_model, random_tokens, tiny_config

LENGTHS = [2, 5, 3, 6]
WIDTH = 6
forward = jax.jit(lambda model, *inputs: model(*inputs))
Answers = list[list[list[int]]]


def random_answers(counts: list[int], longest: int = 7, seed: int = 0) -> Answers:
    """Answers of 0 to `longest` pieces and EOS, so many for each prompt."""
    rng = np.random.default_rng(seed)
    pieces = random_tokens(1000, seed=seed)
    return [
        [[*pieces[i : i + n].tolist(), EOS] for i, n in rng.integers(0, longest + 1, (count, 2))]
        for count in counts
    ]


def alone(model: PaliGemma, batch: Batch, row: int, length: int, answer: list[int]) -> np.ndarray:
    """The same from one forward pass over the images, the prompt and this answer."""
    text = np.zeros((1, WIDTH + 16), np.int32)
    together = [*np.asarray(batch.tokens)[row, :length].tolist(), *answer]
    text[0, : len(together)] = together
    mask_ar = (np.arange(text.shape[1]) >= length).astype(np.int32)[None]
    inputs = [jnp.asarray(x) for x in (sequences_of(batch, [row]).images, text, mask_ar)]
    logprobs = jax.nn.log_softmax(forward(model, *inputs)[0, length - 1 :])
    return np.asarray(logprobs[np.arange(len(answer)), np.array(answer)])


@pytest.mark.parametrize(
    "llm, window, images",
    [(GEMMA, None, 1), (GEMMA, 3, 0), (GEMMA2, None, 2), (GEMMA2, 3, 1)],
    ids=["gemma", "gemma-window-text", "gemma2-two-images", "gemma2-window"],
)
def test_equals_each_answer_alone(llm: GemmaConfig, window: int | None, images: int):
    """In a ragged batch, with different numbers of answers of different lengths."""
    model = random_model(tiny_config(llm, sliding_window=window))
    batch = prompts(LENGTHS, WIDTH, images)
    answers = random_answers([5, 0, 9, 2])
    scored = score_tokens(model, batch, answers)
    assert [[len(a) for a in row] for row in scored] == [[len(a) for a in row] for row in answers]
    for row, length in enumerate(LENGTHS):
        for answer, logprobs in zip(answers[row], scored[row], strict=True):
            assert_close(logprobs, alone(model, batch, row, length, answer))


@pytest.mark.parametrize("name", ["pg1_multi", "pg2"])
def test_greedy_answers_have_big_vision_s_probabilities(name: str):
    golden = big_vision(name)
    images, tokens, mask_ar, mask_input = prompt(golden)
    batch = Batch(images=images, tokens=tokens, mask_ar=mask_ar, mask_input=mask_input.astype(bool))
    greedy = golden["greedy_tokens"]
    with optimized():
        scored = score_tokens(golden.model(), batch, [[row] for row in greedy.tolist()])
    ended = np.cumsum(greedy == EOS, axis=1) - (greedy == EOS) > 0
    assert_close(
        np.where(ended, 0, np.array([row[0] for row in scored])),
        np.where(ended, 0, golden["greedy_logp"]),
        golden.atol,
    )


def test_generated_answers_score_as_they_were_generated(tiny_model: PaliGemma):
    batch = prompts(LENGTHS, WIDTH)
    answers = generate(tiny_model, batch, max_new_tokens=8, eos_token_id=())
    scored = score_tokens(tiny_model, batch, [[answer.tokens] for answer in answers])
    assert_close([row[0] for row in scored], [answer.logprobs for answer in answers])


@pytest.mark.parametrize("tokens_at_once", [16, 64])
def test_many_answers_go_through_in_parts(
    tiny_model: PaliGemma, monkeypatch: pytest.MonkeyPatch, tokens_at_once: int
):
    batch = prompts(LENGTHS[:2], WIDTH)
    answers = random_answers([60, 25])
    whole = score_tokens(tiny_model, batch, answers)
    monkeypatch.setattr(packing, "TOKENS_AT_ONCE", tokens_at_once)
    assert len(list(packing.pack(answers, 2))) > 3
    for row, again in zip(whole, score_tokens(tiny_model, batch, answers), strict=True):
        for a, b in zip(row, again, strict=True):
            assert_close(a, b, atol=1e-5)


def test_company_and_order_change_nothing(tiny_model: PaliGemma):
    batch = prompts(LENGTHS[:1], WIDTH)
    answers = random_answers([12])[0]
    together = score_tokens(tiny_model, batch, [answers])[0]
    backwards = score_tokens(tiny_model, batch, [answers[::-1]])[0][::-1]
    for answer, a, b in zip(answers, together, backwards, strict=True):
        assert_close(a, b, atol=1e-5)
        assert_close(a, score_tokens(tiny_model, batch, [[answer]])[0][0], atol=1e-5)


def test_only_real_prompts_are_scored(tiny_model: PaliGemma):
    batch = prompts(LENGTHS, WIDTH)
    some = dataclasses.replace(batch, row_mask=np.array([False, True, False, True]))
    answers = random_answers([3, 4])
    scored = score_tokens(tiny_model, some, answers)
    every = score_tokens(tiny_model, batch, [[], answers[0], [], answers[1]])
    assert scored == [every[1], every[3]] and every[0] == []


def test_probabilities_of_all_one_token_answers_sum_to_one(tiny_model: PaliGemma):
    """Whatever comes first: EOS, or a piece and then anything."""
    vocab = tiny_model.config.llm.vocab_size
    scored = score_tokens(
        tiny_model,
        prompts([3], 4),
        [[[first] if first == EOS else [first, EOS] for first in range(vocab)]],
    )
    assert sum(np.exp(logprobs[0]) for logprobs in scored[0]) == pytest.approx(1, abs=1e-5)


def test_programs_are_few(tiny_model: PaliGemma):
    """One to read the prompt, one for each of the widths 16 to 512, however many the answers."""

    def programs() -> list[int]:
        return [getattr(f, "_cache_size")() for f in (prefill, packed_logprobs)]  # noqa: B009

    before = programs()
    for count in (1, 2, 3, 7, 20, 40, 41, 90, 200):
        batch = prompts([1 + count % 7], 11, seed=count)
        score_tokens(tiny_model, batch, random_answers([count], seed=count))
    after = programs()
    assert after[0] - before[0] == 1
    assert 1 < after[1] - before[1] <= 6


def test_the_cache_serves_again(tiny_model: PaliGemma):
    _, cache = read_prompts(tiny_model, prompts([3], 4))
    tokens, group = jnp.asarray(random_tokens(1, 16)), jnp.zeros((1, 16), jnp.int32)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(cache)]
    first = packed_logprobs(tiny_model, tokens, group, tokens, cache)
    np.testing.assert_array_equal(first, packed_logprobs(tiny_model, tokens, group, tokens, cache))
    for a, b in zip(before, jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(a, b)


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """The program for a jitted function of these arguments; caches go in and out leaf by leaf."""
    leaves, tree = jax.tree.flatten(args)
    program = jax.jit(lambda *leaves: jax.tree.leaves(function(*tree.unflatten(leaves))))
    return program.lower(*leaves).compile()


def flops(function: Callable[..., Any], *args: Any) -> float:
    return compiled(function, *args).cost_analysis()["flops"]


def test_costs_less_than_one_by_one():
    """16 answers of 6 pieces behind 64 patches and 12 tokens, in operations that XLA counts.

    With one layer, because it counts the body of a loop over layers once.
    """
    config = tiny_config(GEMMA, depth=1)
    img = dataclasses.replace(config.img, depth=1, image_size=32)
    config = dataclasses.replace(config, img=img)
    model = random_model(config)
    pixels = np.zeros((1, 1, 32, 32, 3), np.float32)
    batch = dataclasses.replace(prompts([12], 12), images=pixels)
    answers = [[*row, EOS] for row in random_tokens(16, 6).tolist()]
    packs = list(packing.pack([answers], 1))
    assert len(packs) == 1
    text = [jnp.asarray(x) for x in (batch.tokens, batch.mask_ar, batch.mask_input)]
    read = flops(partial(prefill, slots=76), model, jnp.asarray(batch.images), *text)
    _, cache = read_prompts(model, batch)
    arrays = [jnp.asarray(x) for x in (packs[0].tokens, packs[0].segment_ids, packs[0].targets)]
    shared = read + flops(packed_logprobs, model, *arrays, cache)
    long = jnp.zeros((16, 19), jnp.int32)
    images = jnp.asarray(np.repeat(np.asarray(batch.images), 16, axis=0))
    ratio = shared / flops(forward, model, images, long, long)
    assert ratio < 1 / 4


def test_memory_does_not_hold_all_logits():
    """With PaliGemma's vocabulary 512 tokens would have 527 MB of them."""
    vocab = 257_152
    model = random_model(tiny_config(GEMMA, vocab_size=vocab))
    _, cache = read_prompts(model, prompts([3], 4))
    ints = jnp.zeros((1, 512), jnp.int32)
    with optimized():
        program = compiled(packed_logprobs, model, ints, ints, ints, cache)
    assert program.memory_analysis().temp_size_in_bytes < 512 * vocab * 4 / 2


def test_impossible_requests(tiny_model: PaliGemma):
    batch = prompts(LENGTHS, WIDTH)
    with pytest.raises(ConfigError, match="each of 4 prompts"):
        score_tokens(tiny_model, batch, [[[EOS]]])
    for answer in ([], [-1], [64]):
        with pytest.raises(ConfigError, match="at least one token"):
            score_tokens(tiny_model, prompts([2], 4), [[answer]])


def scored_answer(text: str, *probabilities: float) -> ScoredAnswer:
    tokens = tuple(range(3, 2 + len(probabilities))) + (1,)
    return ScoredAnswer(text, tokens, tuple(math.log(p) for p in probabilities))


CAT = scored_answer("cat", 0.5, 0.8)
LEOPARD = scored_answer("snow leopard", 0.4, 0.9, 0.5, 0.5)


def test_an_answer_adds_up():
    assert LEOPARD.probability == pytest.approx(0.4 * 0.9 * 0.5 * 0.5)
    assert LEOPARD.length == 4 and str(CAT) == "-0.916 cat"
    assert json.loads(json.dumps(CAT.to_dict()))["logprob"] == pytest.approx(math.log(0.4))


def test_probabilities_are_bayes_rule():
    found = classify([LEOPARD, CAT])
    assert found.probabilities == pytest.approx((0.09 / 0.49, 0.4 / 0.49))
    assert found.labels == ("snow leopard", "cat") and found.best == "cat"
    assert found.coverage == pytest.approx(0.49)


def test_length_normalized_takes_the_geometric_mean():
    found = classify([LEOPARD, CAT], length_normalized=True)
    means = np.array([0.09**0.25, 0.4**0.5])
    assert found.probabilities == pytest.approx(means / means.sum())


def test_what_no_float_holds_still_compares():
    found = classify([ScoredAnswer("a", (1,), (-5000.0,)), ScoredAnswer("b", (1,), (-5001.0,))])
    assert found.probabilities == pytest.approx((1 / (1 + math.exp(-1)), 1 / (1 + math.e)))
    assert found.coverage == 0 and found.best == "a"


def test_reads_well():
    found = classify([LEOPARD, CAT])
    assert str(found) == "0.816 cat\n0.184 snow leopard"
    values = json.loads(json.dumps(found.to_dict()))
    assert values["label"] == "cat" and [row["label"] for row in values["labels"]] == [
        "cat",
        "snow leopard",
    ]


def test_a_label_twice_is_refused_when_scored_too():
    with pytest.raises(InvalidPromptError, match="twice"):
        classify([CAT, CAT])
