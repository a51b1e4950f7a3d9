"""When two implementations count as computing the same."""

from pathlib import Path

import numpy as np

from paligemma_jax.benchmark.report import Comparison, compare
from paligemma_jax.benchmark.subjects import Kind, Precision

F32, BF16 = Precision.FLOAT32, Precision.BFLOAT16
LOGITS = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
TOKENS = np.arange(16).reshape(2, 8)


def write(folder: Path, kind: Kind, dtype: Precision, error: float, wrong: int = 0) -> None:
    tokens = TOKENS.copy()
    tokens[0, 8 - wrong :] += 1
    np.savez(folder / f"mid-{kind}-{dtype}.npz", logits=LOGITS + error, tokens=tokens)


def compared(folder: Path, dtype: Precision = F32) -> Comparison:
    return next(c for c in compare(folder, "mid") if c.dtype is dtype)


def test_float32_must_be_equal(tmp_path: Path):
    write(tmp_path, Kind.OURS, F32, 0.0)
    write(tmp_path, Kind.HUGGING_FACE, F32, 1e-5)
    assert compared(tmp_path).same and compared(tmp_path).equal == 16
    write(tmp_path, Kind.HUGGING_FACE, F32, 1e-5, wrong=3)
    assert not compared(tmp_path).same and compared(tmp_path).equal == 13
    write(tmp_path, Kind.HUGGING_FACE, F32, 0.1)
    assert not compared(tmp_path).same


def test_bfloat16_must_be_as_near_as_the_peer(tmp_path: Path):
    write(tmp_path, Kind.HUGGING_FACE, F32, 0.0)
    write(tmp_path, Kind.HUGGING_FACE, BF16, 0.02, wrong=3)
    write(tmp_path, Kind.OURS, BF16, 0.03)
    assert compared(tmp_path, BF16).same
    write(tmp_path, Kind.OURS, BF16, 0.05)
    assert not compared(tmp_path, BF16).same


def test_bfloat16_alone_must_be_equal(tmp_path: Path):
    write(tmp_path, Kind.OURS, BF16, 0.0)
    write(tmp_path, Kind.HUGGING_FACE, BF16, 0.02)
    assert compared(tmp_path, BF16).same
    write(tmp_path, Kind.HUGGING_FACE, BF16, 0.02, wrong=1)
    assert not compared(tmp_path, BF16).same


def test_nothing_to_compare(tmp_path: Path):
    write(tmp_path, Kind.OURS, F32, 0.0)
    assert compare(tmp_path, "mid") == []
