"""`generate` and `best_of` on a model and a batch, and the request that all generation starts from.

Letters: B sequences of the batch, M new tokens at most, V vocabulary, P image tokens, W decoder
width.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.config import GenerationConfig, resolve_config
from paligemma_jax.generation.constraints import Constraint, for_batch, repeat_constraint
from paligemma_jax.generation.decode import (
    DecodePlan,
    DecodeState,
    TokenRecord,
    continue_decoding,
    read_prompts,
    start_decoding,
)
from paligemma_jax.generation.results import FinishReason, Generation
from paligemma_jax.generation.sampling import Greedy, as_pytree, sequence_sampler
from paligemma_jax.generation.stop_strings import StopStrings
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch, bucket
from paligemma_jax.processing.tokenizer import Tokenizer

MIN_CAPACITY = 16  # new tokens; a cache has room for a power of two of at least so many
MIN_TOP_LOGPROBS, MIN_EOS_IDS = 8, 4  # that a program has room for
STOP_CHUNK = 8  # tokens between two looks for stop strings


@dataclasses.dataclass(frozen=True)
class Request:
    """A batch and its configuration, checked and as arrays; all generation starts from one.

    Attributes:
      plan: of the B sequences; for best-of-n each prompt's come `repeats` times, side by side.
      sequence_mask: bool[B], False where a sequence only fills the batch.
      indices: which of the B sequences are real, R of them; the lists below have one entry each.
      capacity: room for new tokens.
      tokenizer: for the text of the results; None leaves it empty.
      stops, limits, eos_ids, prompt_tokens: of each real sequence.
      top_logprobs: how many to report; the plan notes as many or more.
      image_tokens: of each sequence.
    """

    plan: DecodePlan
    sequence_mask: np.ndarray
    indices: Sequence[int]
    capacity: int
    tokenizer: Tokenizer | None
    stops: Sequence[StopStrings | None]
    limits: Sequence[int]
    eos_ids: Sequence[Sequence[int]]
    top_logprobs: int
    prompt_tokens: Sequence[int]
    image_tokens: int

    @classmethod
    def of(
        cls,
        model: PaliGemma,
        batch: Batch,
        tokenizer: Tokenizer | None,
        config: GenerationConfig,
        image_tokens: jax.Array | None,
        *,
        repeats: int = 1,
    ) -> "Request":
        """Raises ConfigError for what does not fit the batch or the model."""
        mask = real_sequences(batch)
        real, vocab_size = np.flatnonzero(mask), model.config.llm.vocab_size
        config = config.select(range(real.size), real.size)
        if config.top_logprobs > vocab_size:
            raise ConfigError(f"top_logprobs: expected at most the {vocab_size} tokens there are.")
        eos_ids = config.values("eos_token_id", real.size)
        if (largest := max((i for ids in eos_ids for i in ids), default=0)) >= vocab_size:
            raise ConfigError(
                f"eos_token_id: expected ids below the {vocab_size:,} tokens there are, got "
                f"{largest}."
            )
        if config.constraint is not None:  # grammars end with the tokenizer's EOS; () stays none
            eos_ids = [tuple(dict.fromkeys((*i, Tokenizer.eos_id))) if i else () for i in eos_ids]
            config = dataclasses.replace(config, eos_token_id=eos_ids)
        if any(config.values("stop", real.size)) and tokenizer is None:
            raise ConfigError("stop needs a tokenizer to read the text with. Pass tokenizer=...")

        def repeated(values: Sequence[Any]) -> list[Any]:
            return [value for value in values for _ in range(repeats)]

        limits = config.values("max_new_tokens", real.size)
        constraint = for_batch(config.constraint, mask, vocab_size, limits)
        stops = [
            StopStrings(tokenizer, strings) if strings and tokenizer else None
            for strings in config.values("stop", real.size)
        ]
        images = 0 if batch.images is None else batch.images.shape[1]
        patches = images * model.config.img.num_patches
        lengths = np.sum(np.asarray(batch.mask_input, bool), axis=1)[real]
        return cls(
            plan=_plan(config, mask, repeat_constraint(constraint, repeats), repeats, vocab_size),
            sequence_mask=np.repeat(mask, repeats),
            indices=np.flatnonzero(np.repeat(mask, repeats)).tolist(),
            capacity=bucket(max(limits), MIN_CAPACITY),
            tokenizer=tokenizer,
            stops=repeated(stops),
            limits=repeated(limits),
            eos_ids=repeated(eos_ids),
            top_logprobs=config.top_logprobs,
            prompt_tokens=repeated(lengths.tolist()),
            image_tokens=patches if image_tokens is None else image_tokens.shape[1],
        )

    def start(self, logits: jax.Array, cache: KVCache) -> DecodeState:
        """The first token of each sequence, from what prefill gave; the cache is used up."""
        mask = jnp.asarray(self.sequence_mask)
        return start_decoding(self.plan, cache, logits, mask, self.capacity)

    def decode(self, model: PaliGemma, logits: jax.Array, cache: KVCache) -> list[Generation]:
        """A generation for each real sequence, in order, from what prefill gave."""
        state = self.start(logits, cache)
        if any(self.stops):
            state = self._until_stopped(model, state)
        else:
            state = continue_decoding(model, state, self.capacity)
        return self.generations(np.asarray(state.progress.tokens), state.progress.record)

    def generations(self, tokens: Int[np.ndarray, "B M"], record: TokenRecord) -> list[Generation]:
        """What the decode loop wrote, as results."""
        arrays = {name: np.asarray(x) for name, x in vars(record).items() if x is not None}
        return [
            self.generation(number, tokens[i], {name: x[i] for name, x in arrays.items()})
            for number, i in enumerate(self.indices)
        ]

    def generation(
        self, number: int, tokens: np.ndarray, record: Mapping[str, np.ndarray], **more: Any
    ) -> Generation:
        """Result of real sequence `number`, cut where it ends.

        `tokens` i32[M or less], `record` the arrays of a `TokenRecord`; `more` are further fields.
        """
        tokens = tokens[: self.limits[number]]
        ends = np.flatnonzero(np.isin(tokens, self.eos_ids[number]))
        reason: FinishReason = "eos" if ends.size else "length"
        length = int(ends[0]) + 1 if ends.size else tokens.size
        stop = self.stops[number]
        found = None if stop is None else stop.find(tokens[:length])
        if found is not None:
            reason, length = "stop", found.tokens
        ids, text = tokens[:length].tolist(), ""
        if self.tokenizer is not None:
            text = self.tokenizer.decode(ids[:-1] if reason == "eos" else ids)
            text = text if found is None else text[: found.characters]
        columns = {name: values[:length].tolist() for name, values in record.items()}
        top = zip(columns.get("top_ids", []), columns.get("top_logprobs", []), strict=True)
        return Generation(
            text=text,
            tokens=tuple(ids),
            logprobs=tuple(columns["logprob"]),
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens[number],
            image_tokens=self.image_tokens,
            stop=None if found is None else found.string,
            top_logprobs=tuple(tuple(zip(*pair, strict=True))[: self.top_logprobs] for pair in top),
            extras=tuple(map(tuple, columns.get("extras", []))),
            **more,
        )

    def _until_stopped(self, model: PaliGemma, state: DecodeState) -> DecodeState:
        """Decodes to the end, looking for stop strings every few tokens."""
        state = continue_decoding(model, state, STOP_CHUNK - 1)  # one is there already
        while True:
            tokens = np.asarray(state.progress.tokens)[:, : int(state.progress.step)]
            done = np.array(state.progress.done)
            found = np.zeros_like(done)
            for i, stop in zip(self.indices, self.stops, strict=True):
                found[i] = not done[i] and stop is not None and stop.find(tokens[i]) is not None
            if np.all(done | found):
                return state
            state = continue_decoding(model, state.end(found) if any(found) else state, STOP_CHUNK)


def _plan(
    config: GenerationConfig,
    mask: np.ndarray,
    constraint: Constraint | None,
    repeats: int,
    vocab_size: int,
) -> DecodePlan:
    """The plan of a batch whose real sequences are those of `mask`; fillers get the first's.

    Numbers of EOS ids and of top logprobs are rounded up, so that few programs are compiled.
    """
    real = np.flatnonzero(mask)
    prompt_of = np.zeros(mask.size, int)
    prompt_of[real] = np.arange(real.size)

    def spread(name: str) -> list[Any]:
        values = config.values(name, real.size)
        return [values[i] for i in np.repeat(prompt_of, repeats)]

    of_prompt = [sample_seeds(seed, repeats) for seed in config.values("seed", real.size)]
    seeds = [seed for i in prompt_of for seed in of_prompt[i]]
    eos = spread("eos_token_id")
    width = bucket(max(map(len, eos)), MIN_EOS_IDS)
    top = config.top_logprobs and min(bucket(config.top_logprobs, MIN_TOP_LOGPROBS), vocab_size)
    sampler = config.sampler
    if sampler is None:
        sampler = sequence_sampler(*map(spread, ("temperature", "top_k", "top_p", "min_p")))
    return DecodePlan(
        seeds=jnp.asarray(np.array([[s >> 32, s & 0xFFFFFFFF] for s in seeds], np.uint32)),
        max_new_tokens=jnp.asarray(spread("max_new_tokens"), jnp.int32),
        min_new_tokens=jnp.asarray(spread("min_new_tokens"), jnp.int32),
        eos_ids=jnp.asarray([[*ids, *[-1] * (width - len(ids))] for ids in eos], jnp.int32),
        sampler=as_pytree(sampler),
        constraint=constraint,
        token_statistics=config.token_statistics,
        top_logprobs=top,
    )


def real_sequences(batch: Batch) -> np.ndarray:
    """bool[B], False on sequences that only fill the batch."""
    size = batch.tokens.shape[0]
    return np.ones(size, bool) if batch.row_mask is None else np.asarray(batch.row_mask)


def sample_seeds(seed: int, count: int) -> list[int]:
    """The seed itself, then others made of it and a number; seed + 1 is the next prompt's."""
    made = [np.random.SeedSequence([seed, n]).generate_state(2, np.uint32) for n in range(1, count)]
    return [seed, *((int(high) << 32) | int(low) for high, low in made)]


def generate(
    model: PaliGemma,
    batch: Batch,
    tokenizer: Tokenizer | None = None,
    *,
    config: GenerationConfig | None = None,
    image_tokens: jax.Array | None = None,
    **settings: Any,
) -> list[Generation]:
    """Generates a sequence for each prompt of `batch`.

    Shapes are rounded up (sequences, text and room for new tokens to powers of two), so that a
    stream of different requests compiles few programs. Where the batch holds answer prefixes (see
    `Processor`), generations are what comes after them; all limits count from there.

    Args:
      model: the model.
      batch: the prompts; those that only fill it are left out.
      tokenizer: for the text of the results, and for `stop`.
      config: how to decode; see `GenerationConfig`.
      image_tokens: f[B, P, W], the images of a batch without any, encoded before.
      **settings: fields of `GenerationConfig`, over those of `config`.

    Raises:
      ConfigError: for settings that are unknown, out of their range, for another number of prompts,
        or that no answer could keep; before anything is computed.
    """
    config = resolve_config("generate", config, settings)
    request = Request.of(model, batch, tokenizer, config, image_tokens)
    logits, cache = read_prompts(model, batch, image_tokens, room=request.capacity)
    return request.decode(model, logits, cache)


def best_of(
    model: PaliGemma,
    batch: Batch,
    tokenizer: Tokenizer | None = None,
    *,
    n: int,
    config: GenerationConfig | None = None,
    image_tokens: jax.Array | None = None,
    **settings: Any,
) -> list[list[Generation]]:
    """`n` samples for each prompt of `batch`, the highest score first.

    The first sample of a prompt is what `generate` samples with the prompt's seed; the others
    depend on that seed and their number alone. Images and prompt are read once, then their keys and
    values are copied for every sample: the cache takes `n` times the memory it takes in `generate`
    (once more while it is copied), for PaliGemma 2 3B in bfloat16 `n` times 104 KiB a token.

    Args:
      n: samples for each prompt; equal ones are not removed.
      model, batch, tokenizer, config, image_tokens, **settings: as for `generate`; the temperature
        is 1 by default, and `length_penalty` says how to rank.

    Raises:
      ConfigError: for less than one sample, several without sampling, and as `generate` does.
    """
    config = best_of_config(n, config, settings)
    request = Request.of(model, batch, tokenizer, config, image_tokens, repeats=n)
    logits, cache = read_prompts(model, batch, image_tokens, room=request.capacity)
    found = request.decode(model, *_repeat(logits, cache, n))
    power = float(config.length_penalty)
    scored = [dataclasses.replace(g, score=g.logprob / len(g.tokens) ** power) for g in found]
    groups = [scored[i : i + n] for i in range(0, len(scored), n)]
    return [sorted(group, key=lambda g: g.score or 0.0, reverse=True) for group in groups]


def best_of_config(
    n: int, config: GenerationConfig | None, settings: Mapping[str, Any]
) -> GenerationConfig:
    """The configuration of `best_of`, which samples unless told otherwise; raises as it does."""
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 4096:
        raise ConfigError(f"n: expected a whole number from 1 to 4,096, got {n!r}. Pass n=4")
    config = resolve_config("best_of", config, settings, also=("n",))
    if config.sampler is None:
        given = config.temperature
        each = given if isinstance(given, Sequence) else [given]
        default = [1.0 if one is None else one for one in each]
        config = dataclasses.replace(
            config, temperature=default if isinstance(given, Sequence) else default[0]
        )
    if n > 1 and (not config.samples or isinstance(config.sampler, Greedy)):
        raise ConfigError(f"n: {n} greedy samples would be equal. Pass temperature=1.0, or n=1")
    return config


@functools.partial(jax.jit, static_argnames=("times",))
def _repeat(logits: jax.Array, cache: KVCache, times: int) -> tuple[jax.Array, KVCache]:
    """Each sequence `times` times, side by side."""
    return jnp.repeat(logits, times, axis=0), cache.repeat(times)
