"""Beam search gives big_vision's answers."""

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_jax.generation.beam_search import BeamPlan, search
from paligemma_jax.generation.decode import prefill
from tests.goldens import BIG_VISION, EOS, big_vision, optimized, prompt

BEAMS, LIMIT = 4, 8


@pytest.mark.parametrize("name", BIG_VISION)
def test_big_vision(name: str):
    """big_vision leaves the first token's logits uncapped, here a second model imitates that."""
    golden = big_vision(name)
    model = golden.model(final_logit_softcap=0.0)
    capped = golden.model(final_logit_softcap=30.0 if name == "pg2_softcap" else 0.0)
    images, tokens, *masks = prompt(golden)
    slots = images.shape[1] * model.config.img.num_patches + tokens.shape[1] + BEAMS * LIMIT
    with optimized():
        logits, cache = prefill(model, images, tokens, *masks, slots)
    plan = BeamPlan(jnp.asarray(LIMIT), jnp.asarray(0.0), EOS, BEAMS, 1, anytime=True)
    ended, _ = search(capped, plan, cache, logits, jnp.ones(len(tokens), bool), LIMIT)
    np.testing.assert_array_equal(ended.tokens[:, 0], golden["beam4_tokens"])
    np.testing.assert_array_equal(ended.score, ended.logprob)
