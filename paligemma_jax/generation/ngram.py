"""Guesses of what comes next in a text: what came after its last words when they stood before.

Letters: B batch, W tokens of the text at most, D tokens guessed, N tokens compared.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

NO_GUESS = -1


def alike(tokens: Int[Array, "*shape"], kinds: Sequence[tuple[int, int]]) -> Int[Array, "*shape"]:
    """The tokens, with all of each kind (first id, id behind the last) made the same."""
    for number, (start, end) in enumerate(kinds):
        tokens = jnp.where((tokens >= start) & (tokens < end), NO_GUESS - 1 - number, tokens)
    return tokens


def guess(
    text: Int[Array, "B W"],
    length: Int[Array, " B"],
    number: int,
    longest: int,
    kinds: Sequence[tuple[int, int]] = (),
) -> Int[Array, "B D"]:
    """`number` tokens that may follow the first `length` tokens of each text; -1 for no guess.

    The last tokens, as many of them as possible and at most `longest`, are looked for earlier in
    the text. Tokens of one of `kinds` count as equal to each other there; of places as good the one
    with more tokens that really are equal counts, then the last one. What follows there is the
    guess, and where the text ends it goes on with the guess itself, so that a text that repeats
    itself is guessed to go on repeating.
    """
    ends = jnp.arange(text.shape[1])
    earlier = ends < length[:, None] - 1
    run = jnp.where(earlier, _run(alike(text, kinds), length, longest), 0)
    goodness = run
    if kinds:
        goodness = run * (longest + 1) + jnp.where(run > 0, _run(text, length, longest), 0)
    end = jnp.argmax(goodness * text.shape[1] + ends, axis=1)
    found = jnp.take_along_axis(run, end[:, None], axis=1) > 0
    period = jnp.maximum(length - 1 - end, 1)[:, None]
    guessed = _at(text, end[:, None] + 1 + jnp.arange(number) % period)
    return jnp.where(found, guessed, NO_GUESS)


def _run(text: jax.Array, length: jax.Array, longest: int) -> jax.Array:
    """i32[B, W]: how many tokens up to each place equal the last ones of the text."""
    back = jnp.arange(longest)
    last = _at(text, length[:, None] - 1 - back)  # i32[B, N], last token first
    before = jnp.arange(text.shape[1])[:, None] - back  # i32[W, N]
    same = (text[:, jnp.maximum(before, 0)] == last[:, None]) & (before >= 0)
    return jnp.sum(jnp.cumprod(same, axis=2), axis=2)


def _at(tokens: jax.Array, places: jax.Array) -> jax.Array:
    return jnp.take_along_axis(tokens, jnp.clip(places, 0, tokens.shape[1] - 1), axis=1)
