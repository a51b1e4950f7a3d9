"""Records of runs that never were."""

from typing import Any

from paligemma_jax.benchmark.report import BenchmarkResult, Comparison
from paligemma_jax.benchmark.subjects import Kind, Precision, Record

F32, BF16 = Precision.FLOAT32, Precision.BFLOAT16
DECODE, FIRST = "decode, batch 1", "first token, batch 1"
CEILINGS = {"read": 50e9, "copy": 60e9, "float32": 0.5e12, "bfloat16": 1e12}


def record(case: str, *seconds: float, **about: Any) -> Record:
    """Of "mid", ours, in float32, unless said otherwise."""
    whole = {"model": "mid", "kind": Kind.OURS, "dtype": F32, "repeat": 0} | about
    return Record(case=case, seconds=seconds, others=(0.0,) * len(seconds), **whole)


def comparison(same: bool = True, model: str = "mid", dtype: Precision = F32) -> Comparison:
    """Of ours with Hugging Face's."""
    return Comparison(
        model=model,
        dtype=dtype,
        first=Kind.OURS,
        second=Kind.HUGGING_FACE,
        tokens=32,
        equal=32 if same else 3,
        difference=1e-5,
        largest=4.0,
        same=same,
    )


def result(
    *records: Record, comparisons: tuple[Comparison, ...] = (), on_cpu: bool = True
) -> BenchmarkResult:
    """A run of these."""
    size = "cpu" if on_cpu else "gpu"
    return BenchmarkResult(size, on_cpu, {"device": "none"}, records, comparisons)
