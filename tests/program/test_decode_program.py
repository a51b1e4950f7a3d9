"""What the decoding loop is on a GPU: few kernels, weights and cache where they lie."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests.program.hlo import Kernel
from tests.program.ours import CACHE_LENGTH, cache_of, decode, model_of, variant
from tests.program.target import Compiled, Target

pytestmark = pytest.mark.program

MODELS = ("paligemma-3b-pt-224", "paligemma2-3b-pt-224")
CASES = [(name, batch) for name in MODELS for batch in (1, 8)] + [("paligemma2-28b-pt-224", 1)]


@functools.cache
def _compiled(target: Target, name: str, batch: int, layers: int | None = None) -> Compiled:
    return decode(target, variant(name, layers=layers), batch)


def _step(compiled: Compiled) -> list[Kernel]:
    """The body of the loop, one step; it is the only loop."""
    (step,) = compiled.program.loops()
    return step


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_at_most_18_kernels_a_layer(h200: Target, name: str, batch: int):
    # The first two layers share a kernel in some programs: what later ones add is a layer's number.
    whole, few = _compiled(h200, name, batch), _compiled(h200, name, batch, layers=4)
    more_layers = variant(name).llm.depth - 4
    more_kernels = len(_step(whole)) - len(_step(few))
    assert more_kernels / more_layers <= 18


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_nothing_big_is_written_but_logits_and_what_the_cache_gains(
    h200: Target, name: str, batch: int
):
    config = variant(name)
    of_layer = batch * config.llm.num_kv_heads * CACHE_LENGTH * config.llm.head_dim
    weights = [leaf.size for leaf in jax.tree.leaves(model_of(config).llm) if leaf.ndim > 1]
    smallest = min(of_layer, *weights)
    big = [
        kernel
        for kernel in _step(_compiled(h200, name, batch))
        if not kernel.in_place
        and any(r.size >= smallest and config.llm.vocab_size not in r.shape for r in kernel.results)
    ]
    assert big == [], "a weight or a layer's cache is copied or transposed"


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_the_cache_stays_in_place(h200: Target, name: str, batch: int):
    config, compiled = variant(name), _compiled(h200, name, batch)
    cache = cache_of(config, batch, CACHE_LENGTH)
    assert compiled.aliased >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    shape = (batch, config.llm.num_kv_heads, CACHE_LENGTH, config.llm.head_dim)
    writes = [k for k in _step(compiled) if k.in_place and shape in [r.shape for r in k.results]]
    assert len(writes) == 2 * config.llm.depth
    assert not [
        k for k in _step(compiled) if not k.in_place and shape in [r.shape for r in k.results]
    ]


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_temporaries_beside_the_logits_are_under_4_megabytes(h200: Target, name: str, batch: int):
    logits = batch * variant(name).llm.vocab_size * jnp.dtype(jnp.float32).itemsize
    assert _compiled(h200, name, batch).temporaries - logits < 4e6
