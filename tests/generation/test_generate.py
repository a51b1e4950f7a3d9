"""`generate` and `best_of` on a model and a batch: from prompts to results."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paligemma_jax as pg
from paligemma_jax.errors import ConfigError
from paligemma_jax.generation import generate as module
from paligemma_jax.generation.constraints import allowed_answers, forbid_tokens
from paligemma_jax.generation.decode import decode_steps, prefill, read_prompts, start_progress
from paligemma_jax.generation.generate import best_of, best_of_config, generate, sample_seeds
from paligemma_jax.generation.image_embeddings import encode, stack
from paligemma_jax.generation.results import Generation
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.image import ImagePreprocessing
from paligemma_jax.processing.processor import Batch, Processor
from tests.generation.decoding import (
    babbler,
    decode_all,
    padded,
    programs,
    questions,
    sequences_of,
    tokenizer,
)
from tests.tiny import SIGLIP, VOCAB, prompts

LENGTHS = [2, 5, 3, 6]
sampled = functools.partial(generate, max_new_tokens=8, temperature=2.0, eos_token_id=())
WILD = dict(temperature=3.0, top_k=20, top_p=0.9, min_p=0.01)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return prompts(LENGTHS, 6)


@pytest.fixture(scope="module")
def free(tiny_model: PaliGemma, batch: Batch) -> list[Generation]:
    """Sequences without end."""
    return generate(tiny_model, batch, max_new_tokens=8, eos_token_id=())


def tokens_of(rows: list[Generation]) -> list[tuple[int, ...]]:
    return [row.tokens for row in rows]


def test_results_are_those_of_the_loop(tiny_model, batch, free):
    tokens, logprobs, _ = decode_all(tiny_model, batch)
    assert [list(row.tokens) for row in free] == tokens.tolist()
    np.testing.assert_allclose([row.logprobs for row in free], logprobs, atol=1e-5)
    assert all(type(token) is int for row in free for token in row.tokens)
    assert [(row.prompt_tokens, row.image_tokens) for row in free] == [(n, 4) for n in LENGTHS]
    assert {row.finish_reason for row in free} == {"length"} and free[0].text == ""


def test_any_of_several_ids_ends_a_sequence(tiny_model, batch, free):
    for eos in (free[0].tokens[2], [free[0].tokens[2], free[1].tokens[5]]):
        ids = [eos] if isinstance(eos, int) else eos
        for row, whole in zip(
            generate(tiny_model, batch, max_new_tokens=8, eos_token_id=eos), free, strict=True
        ):
            places = [i for i, token in enumerate(whole.tokens) if token in ids]
            assert row.tokens == whole.tokens[: places[0] + 1 if places else 8]
            assert row.finish_reason == ("eos" if places else "length")
            assert len(row.logprobs) == len(row.tokens)
    own = [[row.tokens[i]] for i, row in enumerate(free)]
    rows = generate(tiny_model, batch, max_new_tokens=8, eos_token_id=own)
    assert all(row.tokens[-1] == ids[0] for row, ids in zip(rows, own, strict=True))


def test_the_most_probable_tokens_of_every_step(tiny_model, batch, free):
    rows = generate(tiny_model, batch, max_new_tokens=8, eos_token_id=(), top_logprobs=3)
    for row, plain in zip(rows, free, strict=True):
        assert row.tokens == plain.tokens and len(row.top_logprobs) == 8 and not plain.top_logprobs
        for token, logprob, top in zip(row.tokens, row.logprobs, row.top_logprobs, strict=True):
            assert top[0][0] == token and top[0][1] == pytest.approx(logprob, abs=1e-6)
            assert [p for _, p in top] == sorted([p for _, p in top], reverse=True)
            assert len({i for i, _ in top}) == len(top) == 3
    before = programs(start_progress, decode_steps)
    for count in (1, 2, 8):
        (row, *_) = generate(
            tiny_model, batch, max_new_tokens=8, eos_token_id=(), top_logprobs=count
        )
        assert row.top_logprobs[0][:3] == rows[0].top_logprobs[0][:count]
        assert {len(top) for top in row.top_logprobs} == {count}
    assert programs(start_progress, decode_steps) == before


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_least_number_of_tokens(tiny_model, batch, free, count: int):
    """As before up to the end that is not allowed; log-probabilities stay the model's."""
    eos = free[0].tokens[0]
    before = generate(tiny_model, batch, max_new_tokens=8, eos_token_id=eos)
    rows = generate(tiny_model, batch, max_new_tokens=8, eos_token_id=eos, min_new_tokens=count)
    for row, plain in zip(rows, before, strict=True):
        inner = row.tokens[:-1] if row.tokens[-1] == eos else row.tokens
        assert eos not in inner and len(inner) >= count
        assert len(plain.tokens) <= count or row.tokens == plain.tokens
    if count:
        assert rows[0].logprobs[0] < before[0].logprobs[0]  # the likelier one was not allowed


def test_sequences_with_different_settings_share_a_batch(tiny_model, batch):
    """Each gets what it gets alone."""
    own: dict[str, Any] = dict(
        temperature=[0.0, 0.7, 2.0, 3.0],
        top_k=[None, None, 5, 20],
        top_p=[None, 0.9, None, 0.8],
        min_p=[None, None, None, 0.01],
        seed=[1, 2**32, 3, 2**63],
        max_new_tokens=[8, 3, 8, 5],
        min_new_tokens=[0, 2, 8, 1],
        eos_token_id=[[5], [], [7, 9, 11], [5]],
    )
    together = generate(tiny_model, batch, **own)
    for i, row in enumerate(together):
        alone = {name: values[i] for name, values in own.items()}
        assert generate(tiny_model, sequences_of(batch, [i]), **alone)[0].tokens == row.tokens
    assert len(together[1].tokens) == 3 and len(together[2].tokens) == 8


def test_constraints_end_with_the_tokenizer_s_eos():
    """Also where the configuration names the EOS of another tokenizer."""
    constraint = allowed_answers(tokenizer(), ["red", "blue"])
    for row in generate(
        babbler(), questions(2), tokenizer(), constraint=constraint, eos_token_id=9
    ):
        assert row.text in ("red", "blue") and row.finish_reason == "eos"


def test_settings_are_data_and_not_programs(tiny_model, batch):
    """50 calls with 50 different settings compile as many programs as one sampled setting."""
    functions = (prefill, start_progress, decode_steps)
    generate(tiny_model, batch, max_new_tokens=4, temperature=1.0)
    before = programs(*functions)
    rng = np.random.default_rng(0)
    for n in range(50):
        generate(
            tiny_model,
            batch,
            temperature=float(rng.uniform(0.1, 3)),
            top_k=int(rng.integers(1, 70)) if n % 2 else None,
            top_p=float(rng.uniform(0, 1)) if n % 3 else None,
            min_p=float(rng.uniform(0, 1)) if n % 5 == 0 else None,
            seed=int(rng.integers(0, 2**63)),
            max_new_tokens=int(rng.integers(4, 16)),
            min_new_tokens=int(rng.integers(0, 4)),
            eos_token_id=int(rng.integers(0, VOCAB)),
        )
    assert programs(*functions) == before


def test_only_real_sequences_are_returned(tiny_model, batch, free):
    """And values go to the real ones in their order; one seed counts up over them."""
    some = dataclasses.replace(batch, row_mask=np.array([False, True, False, True]))
    rows = generate(tiny_model, some, max_new_tokens=8, eos_token_id=())
    assert tokens_of(rows) == [free[1].tokens, free[3].tokens]
    drawn = sampled(tiny_model, some, seed=[7, 8])
    every = sampled(tiny_model, batch, seed=[0, 7, 0, 8])
    assert tokens_of(drawn) == [every[1].tokens, every[3].tokens]
    same = sequences_of(batch, [1, 1, 1])
    counted = sampled(tiny_model, same, seed=5)
    assert counted == sampled(tiny_model, same, seed=[5, 6, 7])
    assert len(set(tokens_of(counted))) == 3


def test_all_bits_of_a_seed_count(tiny_model, batch):
    one = sequences_of(batch, [1])
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    assert len({sampled(tiny_model, one, seed=s)[0].tokens for s in seeds}) == len(seeds)


def test_a_prompt_without_images(tiny_model, batch, free):
    text = dataclasses.replace(batch, images=None)
    without = generate(tiny_model, text, max_new_tokens=8, eos_token_id=())
    no_images = dataclasses.replace(batch, images=np.asarray(batch.images)[:, :0])
    assert without == generate(tiny_model, no_images, max_new_tokens=8, eos_token_id=())
    assert without != free and without[0].image_tokens == 0


@pytest.mark.parametrize("how", [{}, WILD], ids=["greedy", "sampled"])
@pytest.mark.parametrize("images", [True, False], ids=["images", "text only"])
def test_alone_and_in_any_batch(tiny_model, how: dict[str, Any], images: bool):
    """Any neighbors, any place, any padding: shapes are two, so that two programs do."""

    @settings(max_examples=6, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 6), min_size=4, max_size=4),
        seed=st.integers(0, 1000),
        order=st.permutations(range(4)),
        filling=st.lists(st.booleans(), min_size=4, max_size=4).filter(any),
    )
    def check(lengths: list[int], seed: int, order: list[int], filling: list[bool]) -> None:
        def ask(batch: Batch, seeds: list[int]) -> list[Generation]:
            batch = batch if images else dataclasses.replace(batch, images=None)
            return generate(tiny_model, batch, max_new_tokens=8, seed=seeds, eos_token_id=5, **how)

        batch = prompts(lengths, 6, seed=seed)
        seeds = [seed + 7 * i for i in range(4)]
        alone = [ask(sequences_of(batch, [i]), [seeds[i]])[0] for i in range(4)]
        mixed = padded(sequences_of(batch, order), 5)
        mixed = dataclasses.replace(mixed, row_mask=np.array(filling))
        real = [i for i, is_real in zip(order, filling, strict=True) if is_real]
        for i, row in zip(real, ask(mixed, [seeds[i] for i in real]), strict=True):
            assert row.tokens == alone[i].tokens
            np.testing.assert_allclose(row.logprobs, alone[i].logprobs, atol=1e-5)

    check()


# Best of n.

samples = functools.partial(best_of, n=3, max_new_tokens=6, temperature=2.0)


@pytest.fixture(scope="module")
def eos(tiny_model: PaliGemma, batch: Batch) -> int:
    """A token at which some samples end early."""
    return samples(tiny_model, batch, eos_token_id=())[0][0].tokens[2]


def test_samples_are_those_of_their_seeds(tiny_model, batch, eos):
    """Each sample is what `generate` returns for the prompt alone with the sample's seed."""
    three = sequences_of(batch, [0, 1, 2])
    found = samples(tiny_model, three, seed=[5, 6, 5], eos_token_id=eos)
    for i, (group, seed) in enumerate(zip(found, (5, 6, 5), strict=True)):
        one = functools.partial(sampled, tiny_model, sequences_of(batch, [i]))
        own = [one(seed=s, max_new_tokens=6, eos_token_id=eos)[0] for s in sample_seeds(seed, 3)]
        assert sorted(g.tokens for g in group) == sorted(g.tokens for g in own)
        np.testing.assert_allclose(
            sorted(g.logprob for g in group), sorted(g.logprob for g in own), atol=1e-5
        )


def test_the_highest_score_comes_first(tiny_model, batch, eos):
    def order(penalty: float) -> list[list[tuple[int, ...]]]:
        found = samples(tiny_model, batch, eos_token_id=eos, length_penalty=penalty)
        for group in found:
            scores = [sum(g.logprobs) / len(g.tokens) ** penalty for g in group]
            assert scores == sorted(scores, reverse=True)
            assert [g.score for g in group] == pytest.approx(scores)
        return [tokens_of(group) for group in found]

    total, longest = order(0.0), order(9.0)
    assert [sorted(group) for group in total] == [sorted(group) for group in longest]
    assert total != longest
    assert len(longest[0][0]) == 6 and len(longest[0][-1]) < 6  # a short one comes last


def test_seeds_of_samples_are_all_different():
    seeds = [s for seed in range(50) for s in sample_seeds(seed, 8)]
    assert seeds[::8] == list(range(50)) and len(set(seeds)) == 400
    assert sample_seeds(7, 3) == seeds[56:59]


def test_one_sample_is_generate(tiny_model, batch):
    how: dict[str, Any] = dict(max_new_tokens=6, temperature=2.0, eos_token_id=(), seed=3)
    (first, *_), *_ = best_of(tiny_model, batch, n=1, **how)
    assert first.tokens == generate(tiny_model, batch, **how)[0].tokens
    greedy = best_of(tiny_model, batch, n=1, temperature=0, max_new_tokens=6)
    plain = generate(tiny_model, batch, max_new_tokens=6)
    assert [group[0].tokens for group in greedy] == tokens_of(plain)


def test_samples_of_real_sequences_with_constraints_of_their_own(tiny_model, batch, monkeypatch):
    """The prompts are read once."""
    read = []

    def count(model, batch, *args, **kw):
        read.append(batch.tokens.shape[0])
        return read_prompts(model, batch, *args, **kw)

    monkeypatch.setattr(module, "read_prompts", count)
    some = dataclasses.replace(batch, row_mask=np.array([True, False, True, False]))
    halves = [forbid_tokens(range(VOCAB // 2), VOCAB), forbid_tokens(range(20, VOCAB), VOCAB)]
    low, high = samples(tiny_model, some, constraint=halves, eos_token_id=())
    assert all(token >= VOCAB // 2 for g in low for token in g.tokens)
    assert all(token < 20 for g in high for token in g.tokens)
    assert len(low) == len(high) == 3 and read == [len(LENGTHS)]


def test_impossible_requests(tiny_model, batch):
    for n in (0, True, 10**6):
        with pytest.raises(ConfigError, match="n: expected a whole number"):
            best_of(tiny_model, batch, n=n)
    with pytest.raises(ConfigError, match="greedy samples"):
        best_of(tiny_model, batch, n=2, temperature=0)
    with pytest.raises(ConfigError, match="greedy samples"):
        best_of(tiny_model, batch, n=2, sampler=pg.Greedy())
    with pytest.raises(ConfigError, match="each of 4 prompts, got a list of 3"):
        generate(tiny_model, batch, seed=[1, 2, 3])
    with pytest.raises(ConfigError, match="tokenizer"):
        generate(tiny_model, batch, stop="a")
    with pytest.raises(ConfigError, match=f"eos_token_id: .*{VOCAB}"):
        generate(tiny_model, batch, eos_token_id=[[1], [2], [3], VOCAB])


def test_samples_have_a_default_temperature_where_none_is_given():
    config = best_of_config(2, None, {"temperature": [None, 0.5]})
    assert config.values("temperature", 2) == [1.0, 0.5]


# Answer prefixes.

PROMPTS = ["describe the scene", "read", "where is the circle"]
LENGTH = 10


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(tokenizer(), ImagePreprocessing(SIGLIP.image_size))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in PROMPTS]


def begun(batch: Batch, prefixes: list[tuple[int, ...]]) -> Batch:
    """`batch`, each answer begun with the tokens given."""
    batch = padded(batch, max(map(len, prefixes)))
    tokens, mask = np.array(batch.tokens), np.array(batch.mask_input)
    for i, ids in enumerate(prefixes):
        end = int(mask[i].sum())
        tokens[i, end : end + len(ids)] = ids
        mask[i, end : end + len(ids)] = True
    return dataclasses.replace(batch, tokens=tokens, mask_input=mask)


@pytest.mark.parametrize("with_images", [True, False], ids=["images", "text only"])
def test_going_on_is_what_would_have_come(processor, images, with_images: bool):
    """Greedy sequences, cut anywhere and continued from there, are whole again."""
    batch = processor(images if with_images else None, PROMPTS)
    whole = generate(babbler(), batch, max_new_tokens=LENGTH, eos_token_id=())
    cuts = (1, 4, 0)
    prefixes = [row.tokens[:n] for row, n in zip(whole, cuts, strict=True)]
    rest = generate(
        babbler(), begun(batch, [*prefixes, ()]), max_new_tokens=LENGTH - 4, eos_token_id=()
    )
    for row, answer, n in zip(rest, whole, cuts, strict=True):
        assert row.tokens == answer.tokens[n : n + LENGTH - 4]
        np.testing.assert_allclose(row.logprobs, answer.logprobs[n : n + LENGTH - 4], atol=1e-4)


def test_the_prompt_does_not_see_the_prefix(processor, images):
    """Keys and values of image and prompt are the same with it and without."""
    plain = processor(images, PROMPTS)
    batch = processor(images, PROMPTS, answers=["a red circle", "", "the square"])
    length = SIGLIP.num_patches + int(plain.mask_input[0].sum())
    _, before = read_prompts(babbler(), plain)
    _, after = read_prompts(babbler(), batch)
    for layer in range(babbler().config.llm.depth):
        for late, early in zip(after.read(layer), before.read(layer), strict=True):
            np.testing.assert_allclose(late[0, :, :length], early[0, :, :length], atol=1e-5)


def test_prefixes_in_a_batch_and_with_encoded_images(processor, images):
    prefixes = ["a red circle", "", "the"]
    how: dict[str, Any] = dict(max_new_tokens=LENGTH, temperature=1.5, eos_token_id=())
    together = generate(babbler(), processor(images, PROMPTS, answers=prefixes), **how)
    for i, (prompt, prefix) in enumerate(zip(PROMPTS, prefixes, strict=True)):
        alone = processor([images[i]], [prompt], answers=[prefix])
        assert generate(babbler(), alone, seed=i, **how)[0].tokens == together[i].tokens
    without = generate(babbler(), processor(images, PROMPTS), **how)
    assert without[1].tokens == together[1].tokens and without[0].tokens != together[0].tokens
    encoded = [encode(babbler(), processor.image, image) for image in images]
    text = processor(None, PROMPTS, answers=prefixes)
    found = generate(babbler(), text, image_tokens=stack(encoded, len(text.tokens)), **how)
    assert tokens_of(found) == tokens_of(together)


def test_prefix_and_continuation_make_the_text():
    """Spaces at the seam are in the continuation."""
    decode, ids = tokenizer().decode, tokenizer().encode("a red circle and a square")
    for cut in range(len(ids)):
        assert decode(ids[:cut]) + decode(ids[cut:]) == decode(ids)
    assert generate(babbler(), questions(1), tokenizer(), max_new_tokens=4)[0].text
