"""Numbers read off each step of the decode loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.decode import BoxEvidence, Observer, generate
from paligemma_jax.generation.detection_grammar import detection_grammar
from paligemma_jax.models.paligemma import PaliGemma
from tests.generation.speaking import babbler, questions, tokenizer
from tests.tiny import prompts

LOC = tokenizer().loc_start


def logsumexp(values: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    return np.logaddexp.reduce(values.astype(float), axis=-1)


def test_the_mass_of_locations_and_of_the_neighbourhood():
    logits = np.random.default_rng(0).normal(size=(6, tokenizer().vocab_size)).astype(np.float32)
    tokens = [LOC, LOC + 3, LOC + 500, LOC + 1023, LOC - 1, LOC + 1024]
    observer = BoxEvidence(LOC, radii=(5, 2000))
    assert isinstance(observer, Observer)
    seen = np.asarray(observer.observe(jnp.asarray(logits), jnp.asarray(tokens)))
    everything = logsumexp(logits)
    locations = logits[:, LOC : LOC + 1024]
    np.testing.assert_allclose(seen[:, 0], logsumexp(locations) - everything, rtol=1e-5)
    for row, (low, high) in enumerate([(0, 5), (0, 8), (495, 505), (1018, 1023)]):
        near = logsumexp(locations[row, low : high + 1]) - everything[row]
        np.testing.assert_allclose(seen[row, 1], near, rtol=1e-5)
    assert (seen[4:, 1:] == 0).all()
    np.testing.assert_allclose(seen[:4, 2], seen[:4, 0], rtol=1e-5)


def test_radius_zero_is_the_token_itself():
    logits = jax.random.normal(jax.random.key(0), (1, tokenizer().vocab_size))
    seen = BoxEvidence(LOC, radii=(0,)).observe(logits, jnp.asarray([LOC + 7]))
    np.testing.assert_allclose(seen[0, 1], jax.nn.log_softmax(logits)[0, LOC + 7], rtol=1e-5)


def test_evidence_goes_with_the_tokens():
    """A number pair a token, EOS included, and the tokens are those without an observer."""
    grammar = detection_grammar(tokenizer(), ["circle", "square"])
    ask: dict[str, Any] = dict(max_new_tokens=16, constraint=grammar)
    plain = generate(babbler(), questions(2), **ask)
    seen = generate(babbler(), questions(2), **ask, observer=BoxEvidence(LOC, radii=(2,)))
    for row, observed in zip(plain, seen, strict=True):
        assert row.evidence == () and observed.tokens == row.tokens
        assert len(observed.evidence) == len(row.tokens)
        for token, logprob, (mass, near) in zip(
            observed.tokens, observed.logprobs, observed.evidence, strict=True
        ):
            located = LOC <= token < LOC + 1024
            assert logprob <= near <= mass <= 0 if located else mass < 0 == near


def test_what_does_not_fit(tiny_model: PaliGemma):
    with pytest.raises(ConfigError, match="radii"):
        BoxEvidence(LOC, radii=(4, -1))
    with pytest.raises(ConfigError, match="vocabulary of 64"):
        generate(tiny_model, prompts([2], 4), max_new_tokens=2, observer=BoxEvidence(LOC))
