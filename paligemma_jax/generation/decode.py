"""The programs of generation: one prefill, and a decode loop that stays on the device.

`decode` runs the loop to its end in one program. `start_decoding` and `continue_decoding` run the
same steps some tokens at a time, for whoever must look at an answer while it is made; both ways
give the same tokens.

Letters: B batch, T prompt tokens, M new tokens at most, V vocabulary, K numbers observed a step.

What the decode loop notes down about every step besides the token.

Letters: B batch, V vocabulary, K numbers noted.

From a filled cache to the answers of its rows, as Python values.

What `generate` and `best_of` have in common once the prompts are read.

Images and prompts into the key-value cache, whether the images are encoded already or not.

Letters: B prompts, N pictures a prompt, P patches a picture, T prompt tokens, W decoder width, V
vocabulary.

Batch in, tokens out: what both the pipeline and a script with its own model call.

By what answers are ranked, whether they were drawn or searched for.

Several drawn answers to each prompt, the likeliest first; the prompt is read once.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.constraints import Constraint, PerRow, at_least, for_batch
from paligemma_jax.generation.devices import by_rows
from paligemma_jax.generation.sampling import Greedy, Sampler, Temperature, log_probability
from paligemma_jax.generation.stop_strings import StopStrings
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.layers import Jitted, on_cpu
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.box_scores import NEAR_RADII
from paligemma_jax.processing.processor import Batch, bucket
from paligemma_jax.processing.tokenizer import LOC_PIECES


@runtime_checkable
class Observer(Protocol):
    """A pytree that reads K numbers off each step."""

    def observe(self, logits: Float[Array, "B V"], token: Int[Array, " B"]) -> Float[Array, "B K"]:
        """Numbers about the step that chose `token`; `logits` are the model's, unmasked."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoxEvidence:
    """How sure the model was of a location, and of its neighbourhood.

    Log-probabilities (nats): of all `<loc>` tokens together, whatever was chosen; and of those at
    most so many bins from the chosen one, for each of `radii`, 0 where the chosen token is no
    `<loc>`. A coordinate some bins off may be as good a box, so these say more than the chosen
    token's own probability.
    """

    loc_start: int = dataclasses.field(metadata={"static": True})
    radii: tuple[int, ...] = dataclasses.field(default=NEAR_RADII, metadata={"static": True})

    def __post_init__(self) -> None:
        if min(self.radii, default=0) < 0:
            raise ConfigError(
                f"The radii {self.radii} are no neighbourhoods. 0 or more bins each fit. "
                "Call BoxEvidence(tokenizer.loc_start)"
            )

    def observe(self, logits: Float[Array, "B V"], token: Int[Array, " B"]) -> Float[Array, "B K"]:
        end = self.loc_start + len(LOC_PIECES)
        if not 0 <= self.loc_start <= end <= logits.shape[1]:
            raise ConfigError(
                f"Location tokens from {self.loc_start} on do not fit a vocabulary of "
                f"{logits.shape[1]}. Those of the model's own tokenizer fit. "
                "Call BoxEvidence(tokenizer.loc_start)"
            )
        everything = jax.nn.logsumexp(logits, axis=1)
        locations = logits[:, self.loc_start : end]
        chosen = (token - self.loc_start)[:, None]
        distance = jnp.abs(jnp.arange(len(LOC_PIECES)) - chosen)
        is_location = (chosen[:, 0] >= 0) & (chosen[:, 0] < len(LOC_PIECES))
        columns = [jax.nn.logsumexp(locations, axis=1) - everything]
        for radius in self.radii:
            near = jax.nn.logsumexp(locations, axis=1, where=distance <= radius) - everything
            columns.append(jnp.where(is_location, near, 0.0))
        return jnp.stack(columns, axis=1)


_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """What stays the same from token to token.

    Attributes:
      seeds: u32[B]; a row's draws depend on its own seed only.
      limit: i32[], tokens a row at most.
      sampler: how tokens are chosen.
      eos_id: the token that ends a row.
      constraint: which tokens may come next; None allows all.
      observer: what to note about each step; None notes nothing.
    """

    seeds: jax.Array
    limit: jax.Array
    sampler: Sampler = dataclasses.field(metadata=_STATIC)
    eos_id: int = dataclasses.field(metadata=_STATIC)
    constraint: Constraint | None = None
    observer: Observer | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeProgress:
    """What changes from token to token, besides the cache.

    Attributes:
      step: i32[], tokens written so far; the same for every row.
      token: i32[B], the last one; it is not in the cache yet.
      done: bool[B], the row has ended.
      tokens: i32[B, M], 0 after EOS and where nothing is written yet.
      logprobs: f32[B, M], log-probability (nats) of each under the untempered and unconstrained
        distribution; 0 where the token does not count.
      constraint_state: the constraint's.
      evidence: f32[B, M, K], what the observer noted.
    """

    step: jax.Array
    token: jax.Array
    done: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    constraint_state: Any = None
    evidence: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Decoding between two tokens: made by `start_decoding`, taken on by `continue_decoding`.

    The cache's memory is reused, so a state can be continued once. Its `progress` stays readable
    after that, also while the device already works on the next tokens.
    """

    plan: DecodePlan
    progress: DecodeProgress
    cache: KVCache

    @property
    def finished(self) -> bool:
        """Whether every row has ended or the limit is reached; waits for the device."""
        progress = self.progress
        return int(progress.step) >= int(self.plan.limit) or bool(np.all(progress.done))

    def end_rows(self, rows: Bool[np.ndarray, " B"]) -> "DecodeState":
        """Ends the rows where `rows` is True; they get no further token."""
        progress = self.progress
        done = progress.done | jnp.asarray(rows)
        return dataclasses.replace(self, progress=dataclasses.replace(progress, done=done))


@functools.partial(Jitted, static_argnames=("slots",))
def prefill(
    model: PaliGemma,
    images: Float[Array, "B N height width 3"],
    tokens: Int[Array, "B T"],
    mask_ar: Int[Array, "B T"],
    mask_input: Bool[Array, "B T"],
    slots: int,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Encodes the images, reads the prompts, and returns next-token logits and the filled cache."""
    return model.prefill(model.encode_images(images), tokens, mask_ar, mask_input, slots)


@functools.partial(
    Jitted, static_argnames=("sampler", "capacity", "eos_id"), donate_argnames=("cache",)
)
def decode(
    model: PaliGemma,
    cache: KVCache,
    logits: Float[Array, "B V"],
    row_mask: Bool[Array, " B"],
    seeds: UInt[Array, " B"],
    limit: Int[Array, ""],
    sampler: Sampler,
    capacity: int,
    eos_id: int,
    constraint: Constraint | None = None,
    observer: Observer | None = None,
) -> tuple[Int[Array, "B M"], Float[Array, "B M"], KVCache, Float[Array, "B M K"] | None]:
    """Generates until every row of `row_mask` has ended or `limit` tokens (at most `capacity`).

    Returns tokens (0 after EOS), the log-probability (nats) of each under the untempered and
    unconstrained distribution, and what `observer` noted (0 after EOS). A row's draws depend on its
    own seed only. The cache comes back so that its donated memory is reused in place. Without
    constraint and observer nothing of them is compiled.
    """
    plan = DecodePlan(seeds, limit, sampler, eos_id, constraint, observer)
    first = _first(plan, logits, row_mask, capacity)
    end, cache = _run(model, plan, first, cache, limit)
    return end.tokens, end.logprobs, cache, end.evidence


def start_decoding(
    plan: DecodePlan,
    cache: KVCache,
    logits: Float[Array, "B V"],
    row_mask: Bool[Array, " B"],
    capacity: int,
) -> DecodeState:
    """Chooses the first token of each row of `row_mask` from the logits that prefill gave.

    `capacity`, at least the plan's limit, is the room M for tokens; few different ones compile few
    programs. The cache must have been made with as much room. Nothing waits for the device.
    """
    return DecodeState(plan, _start(plan, logits, row_mask, capacity), cache)


def continue_decoding(model: PaliGemma, state: DecodeState, steps: int) -> DecodeState:
    """Up to `steps` tokens more a row: fewer if all rows end or the plan's limit is reached.

    One program whatever `steps` is. Nothing waits for the device: a state that is continued before
    the one before it is read keeps the device busy.
    """
    plan, progress = state.plan, state.progress
    progress, cache = _continue(model, plan, progress, state.cache, jnp.asarray(steps, jnp.int32))
    return DecodeState(plan, progress, cache)


@functools.partial(jax.jit, static_argnames=("capacity",))
def _start(
    plan: DecodePlan, logits: jax.Array, row_mask: jax.Array, capacity: int
) -> DecodeProgress:
    return _first(plan, logits, row_mask, capacity)


@functools.partial(Jitted, donate_argnames=("cache",))
def _continue(
    model: PaliGemma,
    plan: DecodePlan,
    progress: DecodeProgress,
    cache: KVCache,
    steps: jax.Array,
) -> tuple[DecodeProgress, KVCache]:
    until = jnp.minimum(progress.step + steps, plan.limit)
    return _run(model, plan, progress, cache, until)


def _run(
    model: PaliGemma,
    plan: DecodePlan,
    progress: DecodeProgress,
    cache: KVCache,
    until: jax.Array,
) -> tuple[DecodeProgress, KVCache]:
    """Steps until `until` tokens are written or every row has ended."""

    def unfinished(carried: tuple[DecodeProgress, KVCache]) -> jax.Array:
        progress, _ = carried
        return (progress.step < until) & ~jnp.all(progress.done)

    def step(carried: tuple[DecodeProgress, KVCache]) -> tuple[DecodeProgress, KVCache]:
        progress, cache = carried
        logits, cache = model.extend(progress.token, cache)
        return _write(plan, progress, logits), cache

    return jax.lax.while_loop(unfinished, step, (progress, cache))


def _first(
    plan: DecodePlan, logits: jax.Array, row_mask: jax.Array, capacity: int
) -> DecodeProgress:
    """Progress with one token a row."""
    batch = row_mask.shape[0]
    constraint, evidence = plan.constraint, None
    if plan.observer is not None:
        zero = jnp.zeros((batch,), jnp.int32)
        noted = jax.eval_shape(plan.observer.observe, logits, zero)
        evidence = jnp.zeros((batch, capacity, noted.shape[1]), jnp.float32)
    nothing = DecodeProgress(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros((batch,), jnp.int32),
        done=~row_mask,
        tokens=jnp.zeros((batch, capacity), jnp.int32),
        logprobs=jnp.zeros((batch, capacity), jnp.float32),
        constraint_state=None if constraint is None else constraint.start(batch, plan.limit),
        evidence=evidence,
    )
    return _write(plan, nothing, logits)


def _write(plan: DecodePlan, progress: DecodeProgress, logits: jax.Array) -> DecodeProgress:
    """Progress with one token more, chosen from `logits`."""
    step, done, constraint = progress.step, progress.done, plan.constraint
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(plan.seeds)
    state = progress.constraint_state
    token = plan.sampler(logits if constraint is None else constraint.allow(state, logits), keys)
    logp = log_probability(logits, token)
    token, logp = jnp.where(done, 0, token), jnp.where(done, 0.0, logp)
    return DecodeProgress(
        step=step + 1,
        token=token,
        done=done | (token == plan.eos_id),
        tokens=progress.tokens.at[:, step].set(token),
        logprobs=progress.logprobs.at[:, step].set(logp),
        constraint_state=None if constraint is None else constraint.advance(state, token),
        evidence=_note(plan, progress, logits, token),
    )


def _note(
    plan: DecodePlan, progress: DecodeProgress, logits: jax.Array, token: jax.Array
) -> jax.Array | None:
    if plan.observer is None or progress.evidence is None:
        return None
    seen = jnp.where(progress.done[:, None], 0.0, plan.observer.observe(logits, token))
    return progress.evidence.at[:, progress.step].set(seen)


MIN_CAPACITY = 16  # new tokens; room is made for a power of two of at least so many
CHUNK = 8  # tokens between two looks for stop strings


@dataclasses.dataclass(frozen=True)
class GeneratedTokens:
    """One row's answer: its tokens, and the log-probability (nats) of each.

    Log-probabilities are those of the model, whatever sampler and constraint did to the
    distribution. `evidence` holds an observer's numbers for each token.

    An answer goes up to and including what ended it: EOS, the token with which a stop string was
    complete, or the last of as many as were allowed. `stop` is the stop string that ended it, and
    the text is then cut before it: tokenizer.decode(tokens)[:text_length].
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    evidence: tuple[tuple[float, ...], ...] = ()
    stop: str | None = None
    text_length: int | None = None  # characters; None: all

    @property
    def logprob(self) -> float:
        """Log-probability (nats) of all tokens together, what ended the answer included."""
        return math.fsum(self.logprobs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """What may be asked of answers besides the prompts; see `generate` for each.

    Raises ConfigError for numbers of tokens that no answer can have.
    """

    max_new_tokens: int
    min_new_tokens: int
    sampler: Sampler
    eos_id: int
    constraint: Constraint | Sequence[Constraint] | None
    observer: Observer | None
    stop: StopStrings | None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens}; nothing can be generated. It must be at "
                "least 1."
            )
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens is {self.min_new_tokens}, with max_new_tokens "
                f"{self.max_new_tokens}. From 0 to that many fit. "
                f"Pass max_new_tokens={max(self.min_new_tokens, 1)}"
            )

    @property
    def capacity(self) -> int:
        """Room for new tokens, in few different sizes."""
        return bucket(self.max_new_tokens, MIN_CAPACITY)

    def constraint_of(self, row_mask: np.ndarray, vocab_size: int) -> Constraint | None:
        """Of a whole batch, checked; with `min_new_tokens` in it."""
        constraint = self.constraint
        if self.min_new_tokens:
            constraint = at_least(self.min_new_tokens, self.eos_id, constraint)
        if constraint is None:
            return None
        return for_batch(constraint, row_mask, vocab_size, self.max_new_tokens)


def answer_rows(
    model: PaliGemma,
    settings: AnswerSettings,
    constraint: Constraint | None,
    logits: jax.Array,
    cache: KVCache,
    row_mask: np.ndarray,
    seeds: np.ndarray,
) -> list[GeneratedTokens]:
    """Answers the rows of `row_mask` bool[B], from what prefill gave: one of each, in order.

    `constraint` is `settings.constraint_of(...)`; `seeds` u32[B]. The cache is used up.
    """
    limit = jnp.asarray(settings.max_new_tokens, jnp.int32)
    plan = DecodePlan(
        jnp.asarray(seeds), limit, settings.sampler, settings.eos_id, constraint, settings.observer
    )
    rows = jnp.asarray(row_mask)
    if settings.stop is None:
        tokens, logprobs, _, evidence = decode(
            model,
            cache,
            logits,
            rows,
            plan.seeds,
            limit,
            sampler=plan.sampler,
            capacity=settings.capacity,
            eos_id=plan.eos_id,
            constraint=constraint,
            observer=plan.observer,
        )
    else:
        state = start_decoding(plan, cache, logits, rows, settings.capacity)
        progress = _until_stopped(model, state, settings.stop).progress
        tokens, logprobs, evidence = progress.tokens, progress.logprobs, progress.evidence
    tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
    seen = None if evidence is None else np.asarray(evidence)
    return [
        _cut(
            settings,
            tokens[row, : settings.max_new_tokens],
            logprobs[row],
            None if seen is None else seen[row],
        )
        for row in np.flatnonzero(row_mask)
    ]


def _until_stopped(model: PaliGemma, state: DecodeState, stop: StopStrings) -> DecodeState:
    """Decodes to the end, looking for stop strings every few tokens."""
    state = continue_decoding(model, state, CHUNK - 1)  # one is there already
    while True:
        progress = state.progress
        written = np.asarray(progress.tokens)[:, : int(progress.step)]
        done = np.asarray(progress.done)
        found = [
            not ended and stop.find(row) is not None
            for row, ended in zip(written, done, strict=True)
        ]
        if any(found):
            state = state.end_rows(np.array(found))
        if state.finished:
            return state
        state = continue_decoding(model, state, CHUNK)


def _cut(
    settings: AnswerSettings,
    tokens: np.ndarray,
    logprobs: np.ndarray,
    evidence: np.ndarray | None,
) -> GeneratedTokens:
    ends = np.flatnonzero(tokens == settings.eos_id)
    length = int(ends[0]) + 1 if ends.size else tokens.size
    found = None if settings.stop is None else settings.stop.find(tokens[:length])
    if found is not None:
        length = found.tokens
    seen = () if evidence is None else evidence[:length].tolist()
    return GeneratedTokens(
        tuple(int(t) for t in tokens[:length]),
        tuple(float(p) for p in logprobs[:length]),
        tuple(map(tuple, seen)),
        stop=None if found is None else found.string,
        text_length=None if found is None else found.characters,
    )


def read_prefix(
    model: PaliGemma, batch: Batch, image_tokens: jax.Array | None = None, *, room: int = 0
) -> tuple[jax.Array, KVCache]:
    """Logits f32[B, V] after each prompt, and a cache with room for `room` tokens more.

    `image_tokens` f[B, N * P, W] stand in for the pictures of `batch`, which are then not looked
    at. Raises ConfigError if they are for another number of prompts.
    """
    rows, length = batch.tokens.shape
    place = by_rows(model)
    text = [place(x) for x in (batch.tokens, batch.mask_ar, batch.mask_input)]
    if image_tokens is not None:
        if image_tokens.shape[0] != rows:
            raise ConfigError(
                f"Image tokens of {image_tokens.shape[0]} prompts do not go with {rows} rows. One "
                "of each a row fits. Make them with: stack(encoded, batch.tokens.shape[0])"
            )
        slots = slots_for(image_tokens.shape[1] + length + room)
        return prefill_encoded(model, place(image_tokens), *text, slots=slots)
    images = batch.images
    if images is None:
        size = model.config.img.image_size
        images = np.zeros((rows, 0, size, size, 3), np.float32)
    slots = slots_for(images.shape[1] * model.config.img.num_patches + length + room)
    return prefill(model, place(images), *text, slots=slots)


def slots_for(tokens: int) -> int:
    """Cache slots for so many tokens: on accelerators a multiple of 256.

    For other sizes XLA on GPUs copies the whole cache into a padded one at every step.
    """
    return tokens if on_cpu() else -(-tokens // 256) * 256


@functools.partial(Jitted, static_argnames=("slots",))
def prefill_encoded(
    model: PaliGemma,
    image_tokens: Float[Array, "B NP W"],
    tokens: Int[Array, "B T"],
    mask_ar: Int[Array, "B T"],
    mask_input: Bool[Array, "B T"],
    slots: int,
) -> tuple[Float[Array, "B V"], KVCache]:
    """As `loop.prefill`, with images that are encoded already."""
    return model.prefill(image_tokens, tokens, mask_ar, mask_input, slots)


def generate(
    model: PaliGemma,
    batch: Batch,
    *,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    sampler: Sampler = Greedy(),  # noqa: B008 (frozen)
    seed: int | Sequence[int] = 0,
    eos_id: int = 1,
    constraint: Constraint | Sequence[Constraint] | None = None,
    observer: Observer | None = None,
    stop: StopStrings | None = None,
    image_tokens: jax.Array | None = None,
) -> list[GeneratedTokens]:
    """Answers the real rows of `batch`, each until EOS, a stop string or `max_new_tokens`.

    Shapes are rounded up (rows, text and room for the answer to powers of two), so that a stream
    of different requests compiles few programs. Where the batch holds beginnings of answers (see
    `Processor`), answers are what comes after them; all limits count from there.

    Args:
      model: the model.
      batch: the prompts.
      max_new_tokens: where an answer without end is cut.
      min_new_tokens: EOS is not allowed before so many other tokens, unless `constraint` allows
        nothing else; a stop string still ends an answer.
      sampler: how tokens are chosen.
      seed: one number for the batch (row i then draws from seed + i) or one a row; a row's draws
        depend on its own seed alone.
      eos_id: the token that ends an answer.
      constraint: what may be answered; one for the batch, or one a row, all of one class.
      observer: reads numbers off every step.
      stop: texts that end an answer, which are looked for every 8 tokens.
      image_tokens: the pictures of a batch without any, encoded before (see `prepare`).

    Raises:
      ConfigError: for numbers of tokens that no answer can have, seeds or constraints that do not
        match the rows, and constraints that no answer of `max_new_tokens` could keep.
    """
    settings = AnswerSettings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        sampler=sampler,
        eos_id=eos_id,
        constraint=constraint,
        observer=observer,
        stop=stop,
    )
    row_mask = real_rows(batch)
    together = settings.constraint_of(row_mask, model.config.llm.vocab_size)
    seeds = row_seeds(seed, row_mask)
    logits, cache = read_prefix(model, batch, image_tokens, room=settings.capacity)
    return answer_rows(model, settings, together, logits, cache, row_mask, seeds)


def real_rows(batch: Batch) -> np.ndarray:
    """bool[B], False on rows that only fill the batch."""
    rows = batch.tokens.shape[0]
    return np.ones(rows, bool) if batch.row_mask is None else np.asarray(batch.row_mask)


def row_seeds(seed: int | Sequence[int], row_mask: np.ndarray) -> np.ndarray:
    """u32[B]: seed + i for row i, or the given ones for the real rows in their order."""
    if isinstance(seed, int | np.integer):
        return (int(seed) + np.arange(row_mask.size)).astype(np.uint32)
    real = np.flatnonzero(row_mask)
    if len(seed) != real.size:
        raise ConfigError(
            f"{len(seed)} seeds do not match {real.size} prompts. One seed a prompt, or one number "
            "for all, fits."
        )
    seeds = np.zeros(row_mask.size, np.uint32)
    seeds[real] = np.asarray(seed).astype(np.uint32)
    return seeds


def answer_score(logprob: float, length: int, alpha: float) -> float:
    """logprob / length ** alpha: the higher, the better.

    0 ranks by probability, which favours short answers, 1 by the mean log-probability of a token.
    `length` counts all tokens, EOS included; as Hugging Face's `length_penalty`.
    """
    return logprob / length**alpha


def best_of(
    model: PaliGemma,
    batch: Batch,
    *,
    samples: int,
    alpha: float = 0.0,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    sampler: Sampler = Temperature(),  # noqa: B008 (frozen)
    seed: int | Sequence[int] = 0,
    eos_id: int = 1,
    constraint: Constraint | Sequence[Constraint] | None = None,
    observer: Observer | None = None,
    stop: StopStrings | None = None,
    image_tokens: jax.Array | None = None,
) -> list[list[GeneratedTokens]]:
    """`samples` answers to each real row of `batch`, drawn on their own, best first.

    The first sample of a row is what `generate` draws with the row's seed; the others depend on
    that seed and their number alone. Pictures and prompt are read once, then their keys and values
    are copied for every sample: the cache takes `samples` times the memory it takes in `generate`
    (once more while it is copied), for PaliGemma 2 3B in bfloat16 `samples` times 104 KiB a token.

    Args:
      samples: answers a prompt; equal ones are not removed.
      alpha: answers are ranked by logprob / len(tokens) ** alpha, as in `beam_search`: 0 ranks by
        probability, as big_vision, 1 by the mean log-probability of a token. Log-probabilities are
        the model's, whatever sampler and constraint did, and count what ended the answer.
      model, batch, max_new_tokens, min_new_tokens, sampler, seed, eos_id, constraint, observer,
        stop, image_tokens: as for `generate`.

    Raises:
      ConfigError: for less than one sample, several without a sampler that draws, and as
        `generate` does.
    """
    if samples < 1 or (samples > 1 and isinstance(sampler, Greedy)):
        raise ConfigError(
            f"{samples} samples by {type(sampler).__name__} leave no choice. At least one, and a "
            "sampler that draws, fit. Call best_of(model, batch, samples=4)"
        )
    settings = AnswerSettings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        sampler=sampler,
        eos_id=eos_id,
        constraint=constraint,
        observer=observer,
        stop=stop,
    )
    row_mask = real_rows(batch)
    together = settings.constraint_of(row_mask, model.config.llm.vocab_size)
    if isinstance(together, PerRow):
        together = PerRow(jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), together.rows))
    seeds = sample_seeds(row_seeds(seed, row_mask), samples)
    logits, cache = read_prefix(model, batch, image_tokens, room=settings.capacity)
    logits, cache = _repeat(logits, cache, samples)
    answers = answer_rows(
        model, settings, together, logits, cache, np.repeat(row_mask, samples), seeds
    )
    rows = [answers[i : i + samples] for i in range(0, len(answers), samples)]

    def worst_last(answer: GeneratedTokens) -> float:
        return -answer_score(answer.logprob, len(answer.tokens), alpha)

    return [sorted(row, key=worst_last) for row in rows]


def sample_seeds(seeds: np.ndarray, samples: int) -> np.ndarray:
    """u32[B * samples], from u32[B]: each row's own seed, then others made of it and a number.

    Not seed + 1, seed + 2, ...: these are the seeds of the rows that follow.
    """
    made = [
        [int(seed)]
        + [
            int(np.random.SeedSequence([int(seed), n]).generate_state(1)[0])
            for n in range(1, samples)
        ]
        for seed in seeds
    ]
    return np.array(made, np.uint32).reshape(-1)


@functools.partial(jax.jit, static_argnames=("times",))
def _repeat(logits: jax.Array, cache: KVCache, times: int) -> tuple[jax.Array, KVCache]:
    """Each row `times` times, side by side."""
    return jnp.repeat(logits, times, axis=0), cache.repeat_rows(times)
