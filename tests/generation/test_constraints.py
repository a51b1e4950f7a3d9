"""Constraints: answers from a list, token masks, several at once; of a batch or of a sequence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.generation.constraints import (
    AllOf,
    Constraint,
    TokenMask,
    allow_tokens,
    allowed_answers,
    forbid_tokens,
)
from paligemma_jax.generation.decode import decode_steps, start_progress
from paligemma_jax.generation.detection_grammar import (
    ObjectGrammar,
    detection_grammar,
    segmentation_grammar,
)
from paligemma_jax.generation.generate import generate
from paligemma_jax.generation.results import Generation
from paligemma_jax.models.paligemma import PaliGemma
from tests.generation.decoding import (
    CAPACITY,
    EOS,
    babbler,
    decode_all,
    plan_of,
    programs,
    questions,
    read,
    sequences_of,
    speak,
    start,
    tokenizer,
)
from tests.goldens import assert_close
from tests.tiny import VOCAB, prompts

ANSWERS = ["", "red", "red circle", "red circle and blue square", "12", "1", "Ünïcode; 日\n"]
INDIFFERENT = np.zeros(tokenizer().vocab_size, np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Countdown:
    """A user's own: token 9, 8, 7, ... of a table, in this order."""

    first: jax.Array  # i32[]

    def check(self, vocab_size: int, max_new_tokens: int) -> None:
        pass

    def start(self, batch: int, limit: jax.Array) -> jax.Array:
        return jnp.broadcast_to(self.first, (batch,))

    def allow(self, state: jax.Array, logits: jax.Array) -> jax.Array:
        allowed = jnp.arange(logits.shape[1]) == state[:, None]
        return jnp.where(allowed, logits, -jnp.inf)

    def advance(self, state: jax.Array, token: jax.Array) -> jax.Array:
        return state - 1


def grammars() -> list[ObjectGrammar]:
    """Of three sequences: two tasks, three lists of labels, tables of different sizes."""
    many = [f"{color} {kind}" for color in "abcdefgh" for kind in "ijklmn"]
    return [
        detection_grammar(tokenizer(), "circle", max_objects=9),
        segmentation_grammar(tokenizer(), ["red square", "circle"], max_objects=1),
        detection_grammar(tokenizer(), many, max_objects=200),
    ]


def ask(constraint: Any, mask: np.ndarray | None = None, **settings: Any) -> list[Generation]:
    batch = dataclasses.replace(questions(4), row_mask=mask)
    how: dict[str, Any] = dict(max_new_tokens=32, temperature=2.0, constraint=constraint)
    return generate(babbler(), batch, tokenizer(), **how | settings)


def test_each_answer_is_reached_and_no_other():
    constraint = allowed_answers(tokenizer(), ANSWERS)
    for wanted in ANSWERS:
        logits = INDIFFERENT.copy()
        logits[tokenizer().encode(wanted)] = 1
        logits[EOS] = 0.5
        assert speak(constraint, logits, limit=64) == [*tokenizer().encode(wanted), EOS]
    said = [speak(constraint, INDIFFERENT, limit=64, seed=i, noise=1.0) for i in range(100)]
    assert {tokenizer().decode(tokens) for tokens in said} == set(ANSWERS)
    assert all(tokens[-1] == EOS for tokens in said)


def test_impossible_answers():
    for answers in ([], "yes"):
        with pytest.raises(InvalidPromptError, match="at least one text"):
            allowed_answers(tokenizer(), answers)
    with pytest.raises(InvalidPromptError, match="can represent"):
        allowed_answers(tokenizer(), ["yes", "n▁o"])
    constraint = allowed_answers(tokenizer(), ["red circle", "red"])
    with pytest.raises(ConfigError, match="max_new_tokens: expected at least 3"):
        ask(constraint, max_new_tokens=[9, 2, 9, 9])
    with pytest.raises(ConfigError, match="the model's 64 tokens"):
        constraint.check(64, 8)


def test_masked_tokens_never_come_and_logprobs_stay_the_models(tiny_model: PaliGemma):
    batch = prompts([2, 5], 6)
    free, logprobs, _ = decode_all(tiny_model, batch)
    assert len(set(free[0])) > 1
    forbidden = forbid_tokens(free[0].tolist(), VOCAB)
    without, _, _ = decode_all(tiny_model, batch, constraint=forbidden)
    assert not set(without.flat) & set(free[0])
    same, same_logprobs, _ = decode_all(tiny_model, batch, constraint=forbid_tokens([], VOCAB))
    np.testing.assert_array_equal(free, same)
    assert_close(logprobs, same_logprobs)
    length, batch = 5, prompts([5], 5)
    only = allow_tokens(range(5, 9), VOCAB)
    tokens, logprobs, _ = decode_all(tiny_model, batch, constraint=only)
    assert set(tokens.flat) <= {5, 6, 7, 8}
    text = np.concatenate([batch.tokens[0], tokens[0]])[None]
    mask_ar = (np.arange(text.shape[1]) >= length).astype(np.int32)[None]
    inputs = [jnp.asarray(x) for x in (batch.images, text, mask_ar)]
    logits = jax.jit(lambda model, *inputs: model(*inputs))(tiny_model, *inputs)[0, length - 1 : -1]
    assert_close(logprobs[0], jax.nn.log_softmax(logits)[jnp.arange(CAPACITY), tokens[0]])


def test_impossible_masks():
    everything = np.ones(babbler().config.llm.vocab_size, bool)
    for mask, words in [
        (everything[:-1], "a boolean for each"),
        (everything[None], "a boolean for each"),
        (~everything, "at least one allowed"),
    ]:
        with pytest.raises(ConfigError, match=words):
            ask(TokenMask(mask))
    for token in (-1, VOCAB):
        with pytest.raises(ConfigError, match=f"got {token}"):
            allow_tokens([token], VOCAB)


def test_all_of_several():
    logits = np.zeros(VOCAB, np.float32)
    two = AllOf((allow_tokens(range(3, 9), VOCAB), allow_tokens(range(8, 20), VOCAB)))
    assert isinstance(two, Constraint) and speak(two, logits, limit=4) == [8] * 4
    both = AllOf((forbid_tokens([EOS], 8), allow_tokens([5], 8)))
    rows = jnp.asarray([[0.0] * 8, [0.0] * 5 + [-jnp.inf] + [0.0] * 2])
    allowed = np.asarray(both.allow(both.start(2, jnp.asarray([4, 4])), rows)) > -np.inf
    # Only a sequence without a choice passes over the second one.
    assert allowed[0].tolist() == [token == 5 for token in range(8)]
    assert allowed[1].tolist() == [token not in (EOS, 5) for token in range(8)]
    for wrong, words in [((), "at least one"), ((forbid_tokens([3], 5),), "a boolean for each")]:
        with pytest.raises(ConfigError, match=words):
            ask(AllOf(wrong))


def test_a_least_number_of_tokens_as_far_as_the_constraint_allows():
    some = [forbid_tokens(range(50 * i, 50 * i + 1500), tokenizer().vocab_size) for i in range(4)]
    for constraint in (some[0], some):
        for row in ask(constraint, min_new_tokens=4, max_new_tokens=8):
            assert EOS not in row.tokens[:4] and len(row.tokens) >= 4
    answers = allowed_answers(tokenizer(), ["yes", "no way"])
    for row in ask(answers, min_new_tokens=int(answers.longest) + 5):
        assert row.text in ("yes", "no way") and row.finish_reason == "eos"


def test_one_of_the_users_own(tiny_model: PaliGemma):
    down = Countdown(jnp.asarray(9))
    assert isinstance(down, Constraint)
    tokens, _, _ = decode_all(tiny_model, prompts([2, 3], 4), constraint=down)
    np.testing.assert_array_equal(tokens, [range(9, 1, -1)] * 2)
    each = [Countdown(jnp.asarray(first)) for first in (9, 20)]
    batch = dataclasses.replace(prompts([2, 3, 2, 2], 4), row_mask=np.array([1, 0, 1, 0], bool))
    rows = generate(tiny_model, batch, max_new_tokens=3, eos_token_id=(), constraint=each)
    assert [row.tokens for row in rows] == [(9, 8, 7), (20, 19, 18)]


def test_sequences_of_a_batch_answer_as_each_alone():
    """Tables are padded to the largest, which no sequence can tell; limits are their own."""
    limits = [32, 24, 16]
    together = ask(grammars(), np.array([True, True, True, False]), max_new_tokens=limits)
    for i, grammar in enumerate(grammars()):
        batch = sequences_of(questions(4), [i])
        how: dict[str, Any] = dict(max_new_tokens=limits[i], temperature=2.0, seed=i)
        alone = generate(babbler(), batch, constraint=grammar, **how)
        assert alone[0].tokens == together[i].tokens and len(alone[0].tokens) <= limits[i]
        np.testing.assert_allclose(alone[0].logprobs, together[i].logprobs, atol=1e-5)
    assert len({row.tokens for row in together}) == 3


def test_another_request_compiles_nothing():
    """Labels, task, number of objects and limits are data where tables have about one size."""
    requests = [
        detection_grammar(tokenizer(), "circle", max_objects=9),
        segmentation_grammar(tokenizer(), ["red circle", "square"], max_objects=16),
        detection_grammar(tokenizer(), ["blue", "red circle", "red"], max_objects=1),
    ]
    ask(requests[0])
    ask([*requests, requests[0]])  # constraints of their own have a program of their own
    before = programs(start_progress, decode_steps)
    for request in requests:
        ask(request)
    ask([*requests, requests[0]], min_new_tokens=3, max_new_tokens=31)
    assert programs(start_progress, decode_steps) == before


def test_without_a_constraint_nothing_is_added(tiny_model: PaliGemma):
    """The loop carries what it must: step, token, done, tokens, logprobs and the cache."""
    batch = prompts([2, 5], 6)
    cache = read(tiny_model, batch)[1]

    def carried(constraint: Constraint | None) -> int:
        state = start(tiny_model, batch, constraint=constraint)
        plan = plan_of(2, constraint=constraint)
        program = jax.make_jaxpr(
            lambda model, progress, cache: decode_steps(
                model, plan, progress, cache, jnp.asarray(3)
            )
        )(tiny_model, state.progress, state.cache)
        (jitted,) = (e for e in program.eqns if "jaxpr" in e.params)
        (loops,) = (e for e in jitted.params["jaxpr"].eqns if e.primitive.name == "while")
        return len(loops.outvars)

    assert carried(None) == 5 + len(jax.tree.leaves(cache))
    assert carried(Countdown(jnp.asarray(9))) == 6 + len(jax.tree.leaves(cache))


def test_constraints_for_another_batch():
    with pytest.raises(ConfigError, match="each of 4 prompts, got a list of 3"):
        ask(grammars())
    with pytest.raises(ConfigError, match="AllowedAnswers, ObjectGrammar"):
        ask([*grammars(), allowed_answers(tokenizer(), ["yes"])])
