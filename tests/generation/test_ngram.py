"""Guesses from what stood before."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.generation.prompt_lookup import NO_GUESS, alike, guess

WIDTH, GUESSES, LONGEST = 12, 5, 3
KINDS = ((4, 6),)
_guess = jax.jit(
    lambda text, length, kinds: guess(text, length, GUESSES, LONGEST, kinds), static_argnums=2
)


def expected(text: list[int], kinds: tuple[tuple[int, int], ...]) -> list[int]:
    """The same, place by place."""
    keys = ["kind" if any(a <= t < b for a, b in kinds) else t for t in text]

    def run(tokens: list, end: int) -> int:
        for number in range(min(LONGEST, end), 0, -1):
            if tokens[end - number : end] == tokens[-number:]:
                return number
        return 0

    places = [(run(keys, end), run(text, end), end) for end in range(1, len(text))]
    number, _, end = max(places, default=(0, 0, 0))
    if number == 0:
        return [NO_GUESS] * GUESSES
    written = list(text)
    for i in range(GUESSES):
        written.append(written[end + i])
    return written[len(text) :]


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=WIDTH), min_size=2, max_size=2),
    kinds=st.sampled_from([(), KINDS]),
)
def test_equals_a_search_place_by_place(rows: list[list[int]], kinds: tuple[tuple[int, int], ...]):
    text = np.full((2, WIDTH), 3, np.int32)  # what stands behind the text does not matter
    for i, row in enumerate(rows):
        text[i, : len(row)] = row
    length = jnp.asarray([len(row) for row in rows])
    found = _guess(jnp.asarray(text), length, kinds)
    assert found.tolist() == [expected(row, kinds) for row in rows]


def test_a_repetition_goes_on():
    assert expected([7, 1, 2, 1, 2], ()) == [1, 2, 1, 2, 1]
    assert expected([7, 7], ()) == [7] * 5


def test_kinds():
    tokens = jnp.asarray([0, 4, 5, 6, 9])
    assert alike(tokens, ((4, 6), (9, 10))).tolist() == [0, -2, -2, 6, -3]
