"""The grammar only helps: where the demo's own answer is well formed, it stays as it is."""

import numpy as np

import paligemma_jax as pg
from paligemma_jax.demo.render import render
from paligemma_jax.demo.scene import held_out_scenes
from paligemma_jax.demo.tasks import sample_detect
from paligemma_jax.generation.decode import GeneratedTokens, generate
from paligemma_jax.generation.detection_grammar import detection_grammar
from tests.generation.test_grammar import assert_well_formed

ROWS = 8


def test_greedy_answers_that_fit_are_the_same():
    pali = pg.from_pretrained("demo", dtype="float32")
    tokenizer = pali.processor.tokenizer
    rng = np.random.default_rng(0)
    scenes = held_out_scenes(count=ROWS)
    prompts = [sample_detect(scene, rng).prompt for scene in scenes]
    labels = [prompt.removeprefix("detect ").split(" ; ") for prompt in prompts]
    pictures = [render(scene, pali.config.img.image_size) for scene in scenes]
    batch = pali.processor(pictures, prompts)
    grammars = [detection_grammar(tokenizer, names, max_objects=16) for names in labels]

    def ask(constraint: list | None) -> list[GeneratedTokens]:
        return generate(pali.model, batch, max_new_tokens=64, constraint=constraint)

    fitting = 0
    for free, held, names in zip(ask(None), ask(grammars), labels, strict=True):
        assert_well_formed(list(held.tokens), names, 0)
        try:
            assert_well_formed(list(free.tokens), names, 0)
        except AssertionError:
            continue
        fitting += 1
        assert held.tokens == free.tokens
        np.testing.assert_allclose(held.logprobs, free.logprobs, atol=1e-4)
    assert fitting > ROWS // 2
