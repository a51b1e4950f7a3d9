"""Answers as text while they are made, piece by piece."""

import contextlib
from collections.abc import Callable, Generator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.constraints import Constraint
from paligemma_jax.generation.decode import (
    AnswerSettings,
    DecodePlan,
    DecodeState,
    continue_decoding,
    read_prefix,
    real_rows,
    row_seeds,
    start_decoding,
)
from paligemma_jax.generation.sampling import Greedy, Sampler
from paligemma_jax.generation.stop_strings import StopStrings, TextSoFar
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from paligemma_jax.processing.tokenizer import Tokenizer

# Tokens between two pieces. A piece costs half a millisecond on a CPU: with a model that takes as
# long for a token, chunks of 1 doubled the time of an answer, chunks of 4 cost next to nothing.
CHUNK = 4


def stream(
    model: PaliGemma,
    tokenizer: Tokenizer,
    batch: Batch,
    *,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    sampler: Sampler = Greedy(),  # noqa: B008 (frozen)
    seed: int = 0,
    constraint: Constraint | None = None,
    stop: StopStrings | None = None,
    image_tokens: jax.Array | None = None,
    chunk: int = CHUNK,
) -> Generator[str, None, None]:
    """The answer to a batch of one prompt, in pieces as it is made; see `stream_rows`.

    Raises ConfigError for more than one prompt, else as `stream_rows`.
    """
    if (rows := int(real_rows(batch).sum())) != 1:
        raise ConfigError(
            f"A batch of {rows} prompts has no single answer to stream. One prompt fits. For "
            "several call stream_rows(model, tokenizer, batch)"
        )
    pieces = stream_rows(
        model,
        tokenizer,
        batch,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        sampler=sampler,
        seed=seed,
        constraint=constraint,
        stop=stop,
        image_tokens=image_tokens,
        chunk=chunk,
    )
    return _texts(pieces)


def stream_rows(
    model: PaliGemma,
    tokenizer: Tokenizer,
    batch: Batch,
    *,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    sampler: Sampler = Greedy(),  # noqa: B008 (frozen)
    seed: int | Sequence[int] = 0,
    constraint: Constraint | Sequence[Constraint] | None = None,
    stop: StopStrings | None = None,
    image_tokens: jax.Array | None = None,
    chunk: int = CHUNK,
) -> Generator[tuple[int, str], None, None]:
    """Pieces of the answers to all real rows of `batch`, each with the number of its row.

    The first piece comes after one token, further ones every `chunk` tokens; a piece is never
    empty and never ends inside a character. The pieces of a row, joined, are the text of what
    `generate` answers with the same settings; see there for them. While the caller holds a piece
    the device works on the next; once the iterator is closed, by leaving its loop or by
    `close()`, nothing is left running.

    Raises ConfigError as `generate`, and for a chunk of less than one token; at the call, not at
    the first piece.
    """
    settings = AnswerSettings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        sampler=sampler,
        eos_id=tokenizer.eos_id,
        constraint=constraint,
        observer=None,
        stop=stop,
    )
    if chunk < 1:
        raise ConfigError(
            f"chunk is {chunk}; no piece would ever come. At least 1 token fits. "
            f"Leave it out for {CHUNK}."
        )
    row_mask = real_rows(batch)
    together = settings.constraint_of(row_mask, model.config.llm.vocab_size)
    limit = jnp.asarray(max_new_tokens, jnp.int32)
    seeds = jnp.asarray(row_seeds(seed, row_mask))
    plan = DecodePlan(seeds, limit, sampler, tokenizer.eos_id, together)

    def start() -> DecodeState:
        logits, cache = read_prefix(model, batch, image_tokens, room=settings.capacity)
        return start_decoding(plan, cache, logits, jnp.asarray(row_mask), settings.capacity)

    texts = {int(row): TextSoFar(tokenizer, stop) for row in np.flatnonzero(row_mask)}
    return _pieces(model, start, texts, max_new_tokens, chunk)


def _pieces(
    model: PaliGemma,
    start: Callable[[], DecodeState],
    texts: dict[int, TextSoFar],
    limit: int,
    chunk: int,
) -> Generator[tuple[int, str], None, None]:
    """Keys of `texts` are rows of the batch; their order numbers them."""
    state = start()
    try:
        finished = False
        while not finished:
            progress = state.progress
            written, done = int(progress.step), np.array(progress.done)
            tokens = np.asarray(progress.tokens)[:, :written]
            stopped = np.zeros_like(done)
            pieces = []
            for number, (row, text) in enumerate(texts.items()):
                ended = bool(done[row]) or written >= limit
                if piece := text.grow(tokens[row], ended=ended):
                    pieces.append((number, piece))
                stopped[row] = text.stopped
            finished = written >= limit or bool(np.all(done | stopped))
            if not finished:
                if np.any(stopped & ~done):
                    state = state.end_rows(stopped)
                state = continue_decoding(model, state, chunk)
            yield from pieces
    finally:
        jax.block_until_ready((state.progress, state.cache))


def _texts(pieces: Generator[tuple[int, str], None, None]) -> Generator[str, None, None]:
    with contextlib.closing(pieces):
        for _, piece in pieces:
            yield piece
