"""Published tasks: what is asked, how it is judged, and what others reached."""

from paligemma_jax.evaluation.benchmarks.benchmark import Answer as Answer
from paligemma_jax.evaluation.benchmarks.benchmark import Benchmark as Benchmark
from paligemma_jax.evaluation.benchmarks.evaluate import Evaluation as Evaluation
from paligemma_jax.evaluation.benchmarks.evaluate import evaluate as evaluate
from paligemma_jax.evaluation.benchmarks.example import Example as Example
from paligemma_jax.evaluation.benchmarks.records import read_examples as read_examples
from paligemma_jax.evaluation.benchmarks.registry import BENCHMARKS as BENCHMARKS
from paligemma_jax.evaluation.benchmarks.registry import find_benchmark as find_benchmark
