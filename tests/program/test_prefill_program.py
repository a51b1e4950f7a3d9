"""What reading images and prompts is on a GPU: no attention matrix of all pairs of tokens.

Encoder and decoder have two layers each of their real size: every layer is the same program, and
what one writes the next one overwrites.
"""

import functools

import jax
import pytest

from paligemma_jax.config import PaliGemmaConfig
from tests.program.ours import (
    PROMPT,
    cache_length_for,
    cache_of,
    encode,
    model_of,
    prefill,
    variant,
)
from tests.program.target import Compiled, Target

pytestmark = pytest.mark.program

MODELS = ("paligemma-3b-pt", "paligemma2-3b-pt")
CASES = [(name, size, batch) for name in MODELS for size in (224, 896) for batch in (1, 8)]
LONG = [case for case in CASES if case[1] == 896]


def _config(name: str, size: int) -> PaliGemmaConfig:
    return variant(f"{name}-{size}", layers=2)


@functools.cache
def _prefill(target: Target, name: str, size: int, batch: int) -> Compiled:
    return prefill(target, _config(name, size), batch)


@functools.cache
def _encode(target: Target, batch: int) -> Compiled:
    return encode(target, _config(MODELS[0], 896), batch)


def _largest(compiled: Compiled, dtype: str) -> int:
    """Elements of the largest array of that type that a kernel writes."""
    written = [r for kernel in compiled.program.kernels() for r in kernel.results]
    return max((r.size for r in written if r.dtype == dtype), default=0)


@pytest.mark.parametrize(("name", "size", "batch"), LONG)
def test_prefill_holds_no_full_attention_matrix(h200: Target, name: str, size: int, batch: int):
    config, compiled = _config(name, size), _prefill(h200, name, size, batch)
    pairs = batch * (config.img.num_patches + PROMPT) ** 2
    assert _largest(compiled, "f32") < config.llm.num_heads * pairs
    assert _largest(compiled, "pred") < pairs
    assert compiled.temporaries < 4 * config.llm.num_heads * pairs  # float32


@pytest.mark.parametrize("batch", [1, 8])
def test_the_image_encoder_holds_no_full_attention_matrix(h200: Target, batch: int):
    config, compiled = _config(MODELS[0], 896).img, _encode(h200, batch)
    matrix = batch * config.num_heads * config.num_patches**2
    assert _largest(compiled, "f32") <= matrix / 8
    assert compiled.temporaries < 4 * matrix / 4


@pytest.mark.parametrize(("name", "size", "batch"), CASES)
def test_no_weight_is_copied(h200: Target, name: str, size: int, batch: int):
    config = _config(name, size)
    weights = {
        frozenset(leaf.shape) for leaf in jax.tree.leaves(model_of(config)) if leaf.size > 4e6
    }
    copies = [
        kernel
        for kernel in _prefill(h200, name, size, batch).program.kernels()
        if kernel.does <= {"copy", "transpose", "convert", "bitcast", "parameter", "fusion"}
        and any(frozenset(r.shape) in weights for r in kernel.results)
    ]
    assert copies == []


@pytest.mark.parametrize(("name", "size", "batch"), CASES)
def test_the_cache_is_written_once(h200: Target, name: str, size: int, batch: int):
    config, compiled = _config(name, size), _prefill(h200, name, size, batch)
    slots = cache_length_for(config)
    cache = cache_of(config, batch, slots)
    shapes = [x.shape for x in jax.tree.leaves(cache) if x.ndim == 4]
    writes = [
        kernel
        for kernel in compiled.program.kernels()
        for r in kernel.results
        if r.shape == shapes[0]
    ]
    assert len(writes) <= 2 * len(shapes)  # zeros, and keys or values over them
