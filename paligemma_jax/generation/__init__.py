"""From a batch of prompts to tokens: prefill, decode loop, samplers, constraints, observers."""

from paligemma_jax.generation.allowed import AllowedAnswers as AllowedAnswers
from paligemma_jax.generation.allowed import TokenMask as TokenMask
from paligemma_jax.generation.allowed import allow_tokens as allow_tokens
from paligemma_jax.generation.allowed import allowed_answers as allowed_answers
from paligemma_jax.generation.allowed import forbid_tokens as forbid_tokens
from paligemma_jax.generation.constraint import Constraint as Constraint
from paligemma_jax.generation.generate import GeneratedTokens as GeneratedTokens
from paligemma_jax.generation.generate import generate as generate
from paligemma_jax.generation.grammar import ObjectGrammar as ObjectGrammar
from paligemma_jax.generation.grammar import detection_grammar as detection_grammar
from paligemma_jax.generation.grammar import segmentation_grammar as segmentation_grammar
from paligemma_jax.generation.observer import BoxEvidence as BoxEvidence
from paligemma_jax.generation.observer import Observer as Observer
from paligemma_jax.generation.sampling import Greedy as Greedy
from paligemma_jax.generation.sampling import Sampler as Sampler
from paligemma_jax.generation.sampling import Temperature as Temperature
