"""A row's answer is the same alone and in any batch, padded or not, whatever draws it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_jax.generation.decode import GeneratedTokens, generate
from paligemma_jax.generation.sampling import (
    Chain,
    Greedy,
    MinP,
    Nucleus,
    Sampler,
    Temperature,
    TopK,
)
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from tests.generation.answering import rows_of
from tests.tiny import prompts

SAMPLERS = [
    Greedy(),
    Temperature(temperature=2.0),
    TopK(k=5),
    Nucleus(p=0.9),
    MinP(p=0.05),
    Chain((Temperature(temperature=3.0), TopK(k=20), Nucleus(p=0.9), MinP(p=0.01))),
]
ROWS, WIDTH, TOKENS = 4, 6, 8
EOS = 5  # a piece like any other: some answers end early


def ask(
    model: PaliGemma, batch: Batch, sampler: Sampler, seeds: list[int]
) -> list[GeneratedTokens]:
    return generate(model, batch, max_new_tokens=TOKENS, sampler=sampler, seed=seeds, eos_id=EOS)


def padded(batch: Batch, more: int) -> Batch:
    extra = ((0, 0), (0, more))
    return dataclasses.replace(
        batch,
        tokens=np.pad(batch.tokens, extra),
        mask_ar=np.pad(batch.mask_ar, extra, constant_values=1),
        mask_input=np.pad(batch.mask_input, extra),
    )


def same(found: GeneratedTokens, expected: GeneratedTokens) -> None:
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize("pictures", [True, False], ids=["pictures", "text only"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_alone_and_in_any_batch(tiny_model: PaliGemma, sampler: Sampler, pictures: bool):
    """Any neighbours, any place, any padding: shapes are two, so that two programs do."""

    @settings(max_examples=4, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, WIDTH), min_size=ROWS, max_size=ROWS),
        seed=st.integers(0, 1000),
        order=st.permutations(range(ROWS)),
        filling=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).filter(any),
    )
    def check(lengths: list[int], seed: int, order: list[int], filling: list[bool]) -> None:
        batch = prompts(lengths, WIDTH, seed=seed)
        seeds = [seed + 7 * row for row in range(ROWS)]
        alone = []
        for row in range(ROWS):
            single = rows_of(batch, [row])
            single = single if pictures else dataclasses.replace(single, images=None)
            alone += ask(tiny_model, single, sampler, [seeds[row]])
        mixed = padded(rows_of(batch, order), 5)
        mixed = mixed if pictures else dataclasses.replace(mixed, images=None)
        mixed = dataclasses.replace(mixed, row_mask=np.array(filling))
        real = [row for row, is_real in zip(order, filling, strict=True) if is_real]
        together = ask(tiny_model, mixed, sampler, [seeds[row] for row in real])
        for row, answer in zip(real, together, strict=True):
            same(answer, alone[row])

    check()
