"""Operations, bytes and least times against published sizes and an independent calculation."""

import pytest

from paligemma_jax.benchmark import Precision
from paligemma_jax.benchmark.measure import (
    BytesPerNumber,
    Roofline,
    decode_work,
    encode_work,
    prefill_work,
)
from paligemma_jax.benchmark.subjects import PROXY, find_model

H200 = Roofline(4.3e12, 790e12)
LAPTOP = Roofline(48.7e9, 0.45e12)
BF16, F32 = (BytesPerNumber.of(p) for p in (Precision.BFLOAT16, Precision.FLOAT32))


def about(value: float, digits: float = 5e-3) -> object:
    return pytest.approx(value, rel=digits)


@pytest.mark.parametrize(
    ("pixels", "encoding", "decoder", "least"),
    [(224, 0.2202, 1.155, 1.74), (448, 0.9786, 4.351, 6.75), (896, 5.4797, 18.876, 30.83)],
)
def test_first_token_of_paligemma_3b(pixels: int, encoding: float, decoder: float, least: float):
    config = find_model(f"paligemma-3b-pt-{pixels}")
    images, prompt = encode_work(config, 1, BF16), prefill_work(config, 1, 32, BF16)
    assert images.flops / 1e12 == about(encoding, 3e-4)
    assert images.bytes / 4.3e12 * 1e3 == about(0.194, 0.01)
    assert prompt.flops / 1e12 == about(decoder, 5e-4)
    assert H200.seconds(images, prompt) * 1e3 == about(least, 1e-3)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("paligemma2-3b-pt-224", 1.78),
        ("paligemma2-3b-pt-896", 32.69),
        ("paligemma2-10b-pt-448", 24.47),
        ("paligemma2-28b-pt-224", 19.35),
    ],
)
def test_first_token_of_paligemma_2(name: str, least: float):
    config = find_model(name)
    work = encode_work(config, 1, BF16), prefill_work(config, 1, 32, BF16)
    assert H200.seconds(*work) * 1e3 == about(least, 1e-3)


@pytest.mark.parametrize(
    ("name", "rows", "gigaflops", "gigabytes", "tokens"),
    [
        ("paligemma-3b-pt-224", 1, 5.1, 5.02, 856),
        ("paligemma-3b-pt-224", 8, 40.5, 5.06, 6792),
        ("paligemma-3b-pt-224", 64, 324, 5.40, 51_002),
        ("paligemma2-3b-pt-224", 64, 339, 7.42, 37_077),
        ("paligemma2-3b-pt-896", 64, 392, 33.59, 8192),
        ("paligemma2-10b-pt-224", 1, 18.7, 18.60, 231),
        ("paligemma2-28b-pt-224", 8, 438, 55.4, 621),
    ],
)
def test_decoding_step(name: str, rows: int, gigaflops: float, gigabytes: float, tokens: float):
    config = find_model(name)
    work = decode_work(config, rows, config.img.num_patches + 64, BF16)
    assert work.flops / 1e9 == about(gigaflops, 1e-2)
    assert work.bytes / 1e9 == about(gigabytes, 2e-3)
    assert rows / H200.seconds(work) == about(tokens, 2e-3)


@pytest.mark.parametrize(
    ("name", "encoding", "first", "decode"),
    [("paligemma-3b-pt-224", 0.49, 3.1, 0.206), (PROXY, 0.075, 0.645, 0.0416)],
)
def test_on_a_cpu(name: str, encoding: float, first: float, decode: float):
    config = find_model(name)
    images, prompt = encode_work(config, 1, F32), prefill_work(config, 1, 32, F32)
    assert LAPTOP.seconds(images) == about(encoding, 0.01)
    assert LAPTOP.seconds(images, prompt) == about(first, 0.02)
    assert LAPTOP.seconds(decode_work(config, 1, 320, F32)) == about(decode)


@pytest.mark.parametrize(
    ("precision", "tokens"), [(Precision.INT8, 1708), (Precision.INT4, 2765 * 0.985)]
)
def test_integers(precision: Precision, tokens: float):
    """As published for 4 bits with their scales, which are left out here and take 3 % more."""
    config = find_model("paligemma-3b-pt-224")
    assert 1 / H200.seconds(decode_work(config, 1, 320, BytesPerNumber.of(precision))) == about(
        tokens, 0.05
    )
