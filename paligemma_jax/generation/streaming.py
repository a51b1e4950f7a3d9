"""Sequences as events while they are generated."""

from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.config import GenerationConfig, resolve_config
from paligemma_jax.generation.decode import continue_decoding, read_prompts
from paligemma_jax.generation.generate import Request
from paligemma_jax.generation.results import Generation, GenerationEvent
from paligemma_jax.generation.stop_strings import TextStream
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch
from paligemma_jax.processing.tokenizer import Tokenizer

# Tokens between two events. An event costs half a millisecond on a CPU: with a model that takes as
# long for a token, chunks of 1 doubled the time of a sequence, chunks of 4 cost next to nothing.
CHUNK = 4


def stream(
    model: PaliGemma,
    batch: Batch,
    tokenizer: Tokenizer,
    *,
    config: GenerationConfig | None = None,
    image_tokens: jax.Array | None = None,
    chunk: int = CHUNK,
    **settings: Any,
) -> Generator[GenerationEvent, None, None]:
    """Events of the sequences that `generate` returns for the same arguments, as they are made.

    The first event of a sequence comes after one token, further ones every `chunk` tokens, where
    there is new text; the last one holds its `Generation`. While the caller holds an event the
    device works on the next tokens; once the iterator is closed, by leaving its loop or by
    `close()`, nothing is left running.

    Args:
      chunk: tokens between two events of a sequence.
      model, batch, tokenizer, config, image_tokens, **settings: as for `generate`.

    Raises:
      ConfigError: as `generate`, at the call and not at the first event.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ConfigError(f"chunk: expected a whole number of at least 1, got {chunk!r}.")
    config = resolve_config("stream", config, settings, also=("chunk",))
    request = Request.of(model, batch, tokenizer, config, image_tokens)
    return _events(model, batch, image_tokens, request, tokenizer, chunk)


def _events(
    model: PaliGemma,
    batch: Batch,
    image_tokens: jax.Array | None,
    request: Request,
    tokenizer: Tokenizer,
    chunk: int,
) -> Generator[GenerationEvent, None, None]:
    logits, cache = read_prompts(model, batch, image_tokens, room=request.capacity)
    state = request.start(logits, cache)
    texts = {n: TextStream(tokenizer, stop) for n, stop in enumerate(request.stops)}
    given = dict.fromkeys(texts, 0)  # tokens
    try:
        while texts:
            written, done = int(state.progress.step), np.array(state.progress.done)
            tokens = np.asarray(state.progress.tokens)[:, :written]  # on the device it compiles
            so_far = request.generations(tokens, state.progress.record)
            ended = np.zeros_like(done)
            events = []
            for number in list(texts):
                one, text = so_far[number], texts[number]
                place = request.indices[number]
                if done[place] or one.finish_reason == "stop":
                    ended[place] = True
                    events.append(_event(number, given[number], one, text.finish(one.text), one))
                    del texts[number]
                elif new := text.grow(one.tokens):
                    events.append(_event(number, given[number], one, new, None))
                    given[number] = len(one.tokens)
            if texts:
                stopped = ended & ~done
                state = continue_decoding(
                    model, state.end(stopped) if any(stopped) else state, chunk
                )
            yield from events
    finally:
        jax.block_until_ready((state.progress, state.cache))


def _event(
    number: int, given: int, one: Generation, text: str, whole: Generation | None
) -> GenerationEvent:
    return GenerationEvent(
        text=text,
        tokens=one.tokens[given:],
        logprobs=one.logprobs[given:],
        index=number,
        generation=whole,
    )
