"""Least numbers of tokens, and several constraints at once."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation import decode as loop
from paligemma_jax.generation.constraints import (
    AllOf,
    Constraint,
    MinNewTokens,
    allow_tokens,
    allowed_answers,
    forbid_tokens,
)
from paligemma_jax.generation.decode import GeneratedTokens, generate
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from tests.generation.answering import NO_EOS
from tests.generation.speaking import EOS, babbler, questions, speak, tokenizer
from tests.tiny import VOCAB, prompts

TOKENS = 8


@pytest.fixture(scope="module")
def batch() -> Batch:
    return prompts([2, 5, 3, 6], 6)


def ask(model: PaliGemma, batch: Batch, **kw: Any) -> list[GeneratedTokens]:
    return generate(model, batch, max_new_tokens=TOKENS, **kw)


@pytest.mark.parametrize("count", [0, 1, 3, TOKENS])
def test_least_number_of_tokens(tiny_model: PaliGemma, batch: Batch, count: int):
    """Answers are as before up to the end that is not allowed; EOS is not a token of them."""
    eos = ask(tiny_model, batch, eos_id=NO_EOS)[0].tokens[0]
    before = ask(tiny_model, batch, eos_id=eos)
    assert before[0].tokens == (eos,)
    rows = ask(tiny_model, batch, eos_id=eos, min_new_tokens=count)
    for row, free in zip(rows, before, strict=True):
        inner = row.tokens[:-1] if row.tokens[-1] == eos else row.tokens
        assert eos not in inner and len(inner) >= count
        if len(free.tokens) > count:
            assert row.tokens == free.tokens


def test_logprobs_stay_the_models(tiny_model: PaliGemma, batch: Batch):
    eos = ask(tiny_model, batch, eos_id=NO_EOS)[0].tokens[0]
    longer = ask(tiny_model, batch, eos_id=eos, min_new_tokens=1)[0]
    first = ask(tiny_model, batch, eos_id=eos)[0]
    assert longer.logprobs[0] < first.logprobs[0]  # the likelier one was not allowed


def test_both_keep_their_rules():
    logits = np.zeros(VOCAB, np.float32)
    logits[EOS], logits[7] = 5, 3
    both = AllOf((forbid_tokens([7], VOCAB), MinNewTokens.of(2, EOS)))
    assert isinstance(both, Constraint)
    tokens = speak(both, logits, limit=6)
    assert tokens[-1] == EOS and len(tokens) == 3 and 7 not in tokens
    two = AllOf((allow_tokens(range(3, 9), VOCAB), allow_tokens(range(8, 20), VOCAB)))
    assert speak(two, logits, limit=4) == [8] * 4


def test_the_first_rule_wins_where_nothing_keeps_both():
    answers = allowed_answers(tokenizer(), ["yes", "no way"])
    longest = int(answers.longest)
    both = AllOf((answers, MinNewTokens.of(longest + 5, EOS)))
    logits = np.zeros(tokenizer().vocab_size, np.float32)
    for favoured in ("yes", "no way"):
        path = tokenizer().encode(favoured)
        spoken = speak(both, logits + np.isin(np.arange(logits.size), path), limit=longest + 9)
        assert tokenizer().decode(spoken) in ("yes", "no way") and spoken[-1] == EOS


def test_a_least_number_with_a_users_constraint_one_or_one_a_row():
    some = [forbid_tokens(range(100 * i, 100 * i + 1500), tokenizer().vocab_size) for i in (0, 1)]
    asked: dict[str, Any] = dict(max_new_tokens=TOKENS, min_new_tokens=4)
    for constraint in (some[0], some):
        for row in generate(babbler(), questions(2), constraint=constraint, **asked):
            assert EOS not in row.tokens[:4] and len(row.tokens) >= 4
    each = generate(babbler(), questions(2), constraint=some, **asked)
    alone = generate(babbler(), questions(2), constraint=some[1], **asked)
    assert each[1].tokens == alone[1].tokens


def test_only_a_row_without_a_choice_passes_over():
    """The others of its batch keep every constraint."""
    both = AllOf((MinNewTokens.of(1, EOS), allow_tokens([5], 8)))
    logits = jnp.asarray([[0.0] * 8, [0.0] * 5 + [-jnp.inf] + [0.0] * 2])
    allowed = np.asarray(both.allow(both.start(2, jnp.asarray(4)), logits)) > -np.inf
    assert allowed[0].tolist() == [token == 5 for token in range(8)]
    assert allowed[1].tolist() == [token not in (EOS, 5) for token in range(8)]


def test_other_numbers_are_the_same_program(tiny_model: PaliGemma, batch: Batch):
    ask(tiny_model, batch, min_new_tokens=1)
    before = getattr(loop.decode, "_cache_size")()  # noqa: B009
    ask(tiny_model, batch, min_new_tokens=5)
    assert getattr(loop.decode, "_cache_size")() == before  # noqa: B009


def test_impossible_requests(tiny_model: PaliGemma, batch: Batch):
    with pytest.raises(ConfigError, match="min_new_tokens is 9, with max_new_tokens 8"):
        ask(tiny_model, batch, min_new_tokens=9)
    with pytest.raises(ConfigError, match="min_new_tokens is -1"):
        ask(tiny_model, batch, min_new_tokens=-1)
    with pytest.raises(ConfigError, match="answers must have 9 tokens"):
        ask(tiny_model, batch, constraint=MinNewTokens.of(9, EOS))
    with pytest.raises(ConfigError, match="cannot have -1 tokens"):
        MinNewTokens.of(-1, EOS)
    with pytest.raises(ConfigError, match="does not fit the model"):
        ask(tiny_model, batch, constraint=AllOf((forbid_tokens([3], 5),)))
    with pytest.raises(ConfigError, match="All of no constraints"):
        ask(tiny_model, batch, constraint=AllOf(()))
