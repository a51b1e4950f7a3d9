"""From a batch of prompts to tokens: prefill, decode loop, samplers."""

from paligemma_jax.generation.generate import GeneratedTokens as GeneratedTokens
from paligemma_jax.generation.generate import generate as generate
from paligemma_jax.generation.sampling import Greedy as Greedy
from paligemma_jax.generation.sampling import Sampler as Sampler
from paligemma_jax.generation.sampling import Temperature as Temperature
