"""Constraints in the decode loop: one for a batch, one a row, and what they compile."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation import decode as loop
from paligemma_jax.generation.constraints import Constraint, allowed_answers, forbid_tokens
from paligemma_jax.generation.decode import GeneratedTokens, generate
from paligemma_jax.generation.detection_grammar import (
    ObjectGrammar,
    detection_grammar,
    segmentation_grammar,
)
from paligemma_jax.generation.sampling import Greedy, Temperature
from paligemma_jax.models.paligemma import PaliGemma
from tests.generation.answering import CAPACITY, NO_EOS, answer, rows_of
from tests.generation.speaking import babbler, questions, tokenizer
from tests.tiny import SIGLIP, prompts

WARM = Temperature(temperature=2.0)


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
    """Of three rows: two tasks, three lists of labels, tables of different sizes."""
    many = [f"{colour} {kind}" for colour in "abcdefgh" for kind in "ijklmn"]
    return [
        detection_grammar(tokenizer(), "circle", max_objects=9),
        segmentation_grammar(tokenizer(), ["red square", "circle"], max_objects=1),
        detection_grammar(tokenizer(), many, max_objects=200),
    ]


def ask(constraint: Any, row_mask: np.ndarray | None = None, **kw: Any) -> list[GeneratedTokens]:
    batch = dataclasses.replace(questions(4), row_mask=row_mask)
    return generate(babbler(), batch, max_new_tokens=32, sampler=WARM, constraint=constraint, **kw)


def test_one_of_the_users_own(tiny_model: PaliGemma):
    down = Countdown(jnp.asarray(9))
    assert isinstance(down, Constraint)
    tokens, _, _ = answer(tiny_model, prompts([2, 3], 4), constraint=down)
    np.testing.assert_array_equal(tokens, [range(9, 1, -1)] * 2)


def test_one_a_row(tiny_model: PaliGemma):
    rows = [Countdown(jnp.asarray(first)) for first in (9, 20)]
    batch = dataclasses.replace(prompts([2, 3, 2, 2], 4), row_mask=np.array([1, 0, 1, 0], bool))
    answers = generate(tiny_model, batch, max_new_tokens=3, eos_id=NO_EOS, constraint=rows)
    assert [row.tokens for row in answers] == [(9, 8, 7), (20, 19, 18)]


def test_rows_of_a_batch_answer_as_each_alone():
    """Tables are padded to the largest, which no row can tell."""
    real = np.array([True, True, True, False])
    together = ask(grammars(), real)
    for row, grammar in enumerate(grammars()):
        alone = generate(
            babbler(),
            rows_of(questions(4), [row]),
            max_new_tokens=32,
            sampler=WARM,
            seed=row,
            constraint=grammar,
        )
        assert alone[0].tokens == together[row].tokens
        np.testing.assert_allclose(alone[0].logprobs, together[row].logprobs, atol=1e-5)
    assert len({row.tokens for row in together}) == 3


def test_another_request_compiles_nothing():
    """Labels, task, number of objects and budget are data where tables have about one size."""

    def programs() -> int:
        return getattr(loop.decode, "_cache_size")()  # noqa: B009

    requests = [
        detection_grammar(tokenizer(), "circle", max_objects=9),
        segmentation_grammar(tokenizer(), ["red circle", "square"], max_objects=16),
        detection_grammar(tokenizer(), ["blue", "red circle", "red"], max_objects=1),
    ]
    ask(requests[0])
    ask([requests[0]] * 4)
    before = programs()
    for request in requests:
        ask(request)
    ask([*requests, requests[0]])
    assert programs() == before


def test_without_a_constraint_nothing_is_added(tiny_model: PaliGemma):
    """The loop carries what it must: step, token, done, tokens, logprobs and the cache."""
    batch = prompts([2, 5], 6)
    inputs = [jnp.asarray(x) for x in (batch.images, batch.tokens, batch.mask_ar, batch.mask_input)]
    slots = SIGLIP.num_patches + 6 + CAPACITY
    logits, cache = loop.prefill(tiny_model, *inputs, slots=slots)
    given = (jnp.ones(2, bool), jnp.zeros(2, jnp.uint32), jnp.asarray(3))

    def carried(constraint: Constraint | None) -> int:
        program = jax.make_jaxpr(
            lambda model, logits, cache: loop.decode(
                model, cache, logits, *given, Greedy(), CAPACITY, -1, constraint
            )
        )(tiny_model, logits, cache)
        (jitted,) = (e for e in program.eqns if "jaxpr" in e.params)
        (loops,) = (e for e in jitted.params["jaxpr"].eqns if e.primitive.name == "while")
        return len(loops.outvars)

    assert carried(None) == 5 + len(jax.tree.leaves(cache))
    assert carried(Countdown(jnp.asarray(9))) == 6 + len(jax.tree.leaves(cache))


def test_constraints_that_do_not_go_with_the_rows():
    with pytest.raises(ConfigError, match="3 constraints do not match 4 prompts"):
        ask(grammars())
    mixed = [*grammars(), allowed_answers(tokenizer(), ["yes"])]
    with pytest.raises(ConfigError, match="AllowedAnswers, ObjectGrammar"):
        ask(mixed)
    with pytest.raises(ConfigError, match="does not fit the model"):
        ask([forbid_tokens([3], 64)] * 4)
