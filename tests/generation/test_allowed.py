"""Answers from a list, and masks over the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.generation.constraints import (
    TokenMask,
    allow_tokens,
    allowed_answers,
    forbid_tokens,
)
from paligemma_jax.generation.decode import generate
from paligemma_jax.models.paligemma import PaliGemma
from tests.generation.answering import CAPACITY, answer, rows_of
from tests.generation.speaking import EOS, babbler, questions, speak, tokenizer
from tests.goldens import assert_close
from tests.tiny import VOCAB, prompts

ANSWERS = ["", "red", "red circle", "red circle and blue square", "12", "1", "Ünïcode; 日\n"]
INDIFFERENT = np.zeros(tokenizer().vocab_size, np.float32)


def test_each_answer_is_reached_and_no_other():
    constraint = allowed_answers(tokenizer(), ANSWERS)
    for wanted in ANSWERS:
        logits = INDIFFERENT.copy()
        logits[tokenizer().encode(wanted)] = 1
        logits[EOS] = 0.5
        tokens = speak(constraint, logits, limit=64)
        assert tokens == [*tokenizer().encode(wanted), EOS]
    said = [speak(constraint, INDIFFERENT, limit=64, seed=i, noise=1.0) for i in range(100)]
    assert {tokenizer().decode(tokens) for tokens in said} == set(ANSWERS)
    assert all(tokens[-1] == EOS for tokens in said)


def test_a_model_gives_an_allowed_answer_each_row_its_own():
    mine, yours = ["yes", "no"], ["red circle", "blue square"]
    answers = generate(
        babbler(),
        questions(2),
        max_new_tokens=8,
        constraint=[allowed_answers(tokenizer(), texts) for texts in (mine, yours)],
    )
    first, second = (tokenizer().decode(row.tokens) for row in answers)
    assert first in mine and second in yours


@pytest.mark.parametrize("answers", [[], "yes"])
def test_no_list_of_answers(answers: list[str] | str):
    with pytest.raises(InvalidPromptError, match="at least one text"):
        allowed_answers(tokenizer(), answers)


def test_impossible_answers():
    with pytest.raises(InvalidPromptError, match="cannot represent"):
        allowed_answers(tokenizer(), ["yes", "n▁o"])
    constraint = allowed_answers(tokenizer(), ["red circle", "red"])
    with pytest.raises(ConfigError, match="max_new_tokens is 2, but .* has 3 tokens"):
        generate(babbler(), questions(1), max_new_tokens=2, constraint=constraint)
    with pytest.raises(ConfigError, match="the model has 64"):
        constraint.check(64, 8)


def test_masked_tokens_never_come(tiny_model: PaliGemma):
    batch = prompts([2, 5], 6)
    free, _, _ = answer(tiny_model, batch)
    assert len(set(free[0])) > 1
    without, _, _ = answer(tiny_model, batch, constraint=forbid_tokens(free[0].tolist(), VOCAB))
    assert not set(without.flat) & set(free[0])
    only, _, _ = answer(tiny_model, batch, constraint=allow_tokens([5, 9], VOCAB))
    assert set(only.flat) <= {5, 9}


def test_a_mask_that_allows_everything_changes_nothing(tiny_model: PaliGemma):
    batch = prompts([2, 5], 6)
    free, logprobs, _ = answer(tiny_model, batch)
    same, same_logprobs, _ = answer(tiny_model, batch, constraint=forbid_tokens([], VOCAB))
    np.testing.assert_array_equal(free, same)
    assert_close(logprobs, same_logprobs)


def test_logprobs_are_those_of_the_model_without_the_mask(tiny_model: PaliGemma):
    length, batch = 5, prompts([5], 5)
    tokens, logprobs, _ = answer(tiny_model, batch, constraint=allow_tokens(range(5, 9), VOCAB))
    text = np.concatenate([batch.tokens[0], tokens[0]])[None]
    mask_ar = (np.arange(text.shape[1]) >= length).astype(np.int32)[None]
    inputs = [jnp.asarray(x) for x in (rows_of(batch, [0]).images, text, mask_ar)]
    forward = jax.jit(lambda model, *inputs: model(*inputs))
    logits = forward(tiny_model, *inputs)[0, length - 1 : -1]
    assert_close(logprobs[0], jax.nn.log_softmax(logits)[jnp.arange(CAPACITY), tokens[0]])


def test_masks_that_do_not_fit():
    everything = np.ones(babbler().config.llm.vocab_size, bool)
    for mask, words in [
        (everything[:-1], "does not fit the model"),
        (everything[None], "does not fit the model"),
        (~everything, "allows no token"),
    ]:
        with pytest.raises(ConfigError, match=words):
            generate(babbler(), questions(1), max_new_tokens=2, constraint=TokenMask(mask))
    for token in (-1, VOCAB):
        with pytest.raises(ConfigError, match=f"Token {token} is not"):
            allow_tokens([token], VOCAB)
