"""Results of runs that never were."""

from typing import Any

from paligemma_jax.benchmark import Implementation, Precision, Task
from paligemma_jax.benchmark.cases import Decode, FirstToken
from paligemma_jax.benchmark.report import BenchmarkResult
from paligemma_jax.benchmark.results import CaseResult, Comparison
from paligemma_jax.benchmark.subjects import PROXY

OURS, HUGGING_FACE = Implementation.OURS, Implementation.HUGGING_FACE
F32, BF16 = Precision.FLOAT32, Precision.BFLOAT16
DECODE, FIRST = Decode(1).name, FirstToken(1).name
ROOFLINE = {"read": 50e9, "copy": 60e9, "float32": 0.5e12, "bfloat16": 1e12}


def case(name: str, *seconds: float, **about: Any) -> CaseResult:
    """Of the 4-layer proxy, ours, inference in float32, unless said otherwise."""
    whole = {"model": PROXY, "implementation": OURS, "dtype": F32, "repeat": 0}
    whole |= {"task": Task.INFERENCE, "other_cpu": (0.0,) * len(seconds)} | about
    return CaseResult(case=name, seconds=seconds, **whole)


def comparison(
    equal: bool = True, task: Task = Task.INFERENCE, dtype: Precision = F32
) -> Comparison:
    """Of ours with Hugging Face's."""
    return Comparison(PROXY, task, dtype, HUGGING_FACE, equal, 1e-5, "32 of 32 tokens equal")


def run_of(
    *results: CaseResult, comparisons: tuple[Comparison, ...] = (), on_cpu: bool = True
) -> BenchmarkResult:
    """A run of these."""
    size = "cpu" if on_cpu else "gpu"
    return BenchmarkResult(size, on_cpu, {"device": "none"}, results, comparisons)
