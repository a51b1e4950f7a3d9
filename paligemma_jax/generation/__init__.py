"""From a batch of prompts to sequences: decoding, samplers, beam search, constraints, streams.

The functions are `paligemma_jax.generate`, `stream`, `best_of`, `beam_search`,
`prompt_lookup_generate` and `score`; `paligemma_jax.GenerationConfig` says how they decode.
"""
