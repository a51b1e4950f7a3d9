"""Log-probabilities of given answers: image and prompt are read once, all answers share them.

An answer is causal and the prefix never sees it, so reading the prefix once is exact: every answer
gets what a forward pass over image, prompt and that answer alone would give it.

Letters: B prompts, T tokens of a pack of answers (see packing.py), W decoder width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.generation.encoded import group_by_picture_count, prepare
from paligemma_jax.generation.packing import pack
from paligemma_jax.generation.prefix import read_prefix
from paligemma_jax.models.cache import KVCache
from paligemma_jax.models.jitted import Jitted
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.batch import Batch
from paligemma_jax.processing.candidates import candidate_tokens
from paligemma_jax.processing.processor import Processor

HEAD_TOKENS = 64  # whose logits exist at a time: 66 MB with PaliGemma's vocabulary


@dataclasses.dataclass(frozen=True)
class ScoredAnswer:
    """How likely the model is to give exactly this answer, and to end there.

    Attributes:
      text: the answer.
      tokens: its tokens, EOS included.
      logprobs: log-probability (nats) of each token after image, prompt and the tokens before it.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float:
        """Log-probability (nats) of the whole answer: the sum, EOS included."""
        return math.fsum(self.logprobs)

    @property
    def probability(self) -> float:
        """Probability of the whole answer; 0.0 below what a float can hold."""
        return math.exp(self.logprob)

    @property
    def length(self) -> int:
        """Number of tokens, EOS included."""
        return len(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "text": self.text,
            "logprob": self.logprob,
            "tokens": list(self.tokens),
            "logprobs": list(self.logprobs),
        }

    def __str__(self) -> str:
        return f"{self.logprob:.3f} {self.text}"


def score(
    model: PaliGemma,
    processor: Processor,
    images: Sequence[Any] | None,
    prompts: Sequence[str],
    candidates: Sequence[Any],
    *,
    batch_size: int = 32,
    allow_urls: bool = False,
) -> list[list[ScoredAnswer]]:
    """Scores the candidate answers (one list of texts a prompt), in the order given.

    `images` is as in `Pipeline.generate`; entries may be EncodedImages. An empty candidate is the
    empty answer, EOS alone; one that comes twice is scored twice. A candidate is tokenized in the
    one way that training would; other pieces that spell the same text are not counted.

    Raises:
      InvalidImageError, InvalidPromptError: naming what does not fit: a prompt without candidates,
        a candidate that is no text, or one that is too long behind its prompt.
    """
    entries = [None] * len(prompts) if images is None else images
    if isinstance(prompts, str) or len(entries) != len(prompts):
        processor(entries, prompts)  # raises, saying what fits
    lengths = np.sum(np.asarray(processor(None, prompts).mask_input), axis=1)
    if len(candidates) != len(prompts):
        raise InvalidPromptError(
            f"{len(candidates)} lists of candidates do not go with {len(prompts)} prompts. One "
            "list for each prompt fits."
        )
    answers = [
        candidate_tokens(processor, row, int(length))
        for row, length in zip(candidates, lengths, strict=False)
    ]
    scored: dict[int, list[ScoredAnswer]] = {}
    for places in group_by_picture_count(entries).values():
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            batch, image_tokens = prepare(
                model,
                processor,
                [entries[i] for i in chosen],
                [prompts[i] for i in chosen],
                allow_urls=allow_urls,
            )
            rows = score_tokens(model, batch, [answers[i] for i in chosen], image_tokens)
            for place, row in zip(chosen, rows, strict=True):
                scored[place] = [
                    ScoredAnswer(text, tuple(tokens), logprobs)
                    for text, tokens, logprobs in zip(
                        candidates[place], answers[place], row, strict=True
                    )
                ]
    return [scored[i] for i in range(len(prompts))]


def score_tokens(
    model: PaliGemma,
    batch: Batch,
    answers: Sequence[Sequence[Sequence[int]]],
    image_tokens: jax.Array | None = None,
) -> list[list[tuple[float, ...]]]:
    """Log-probability (nats) of every token of every answer (ending in EOS) to each real row.

    `image_tokens` as in `prepare`. Memory does not grow with the number of answers: they are read
    some hundred tokens at a time. Raises ConfigError for answers that do not go with the batch.
    """
    rows = batch.tokens.shape[0]
    row_mask = np.ones(rows, bool) if batch.row_mask is None else np.asarray(batch.row_mask)
    real = np.flatnonzero(row_mask)
    _check_answers(answers, real.size, model.config.llm.vocab_size)
    placed: list[Sequence[Sequence[int]]] = [()] * rows
    for row, own in zip(real, answers, strict=True):
        placed[row] = own
    logits, cache = read_prefix(model, batch, image_tokens)
    first = np.asarray(_log_softmax(logits))
    scored = [[[float(first[r, answer[0]])] for answer in own] for r, own in enumerate(placed)]
    for p in pack(placed, rows):
        tokens, group, targets = (jnp.asarray(x) for x in (p.tokens, p.group, p.targets))
        logprobs = np.asarray(branch_logprobs(model, tokens, group, targets, cache))
        for place in p.places:
            end = place.start + place.length
            scored[place.row][place.answer] += logprobs[place.row, place.start : end].tolist()
    return [[tuple(answer) for answer in scored[row]] for row in real]


@Jitted
def branch_logprobs(
    model: PaliGemma,
    tokens: Int[Array, "B T"],
    group: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    cache: KVCache,
) -> Float[Array, "B T"]:
    """Log-probability (nats) of `targets`, each after its token; logits exist for 64 at a time."""
    hidden = model.branch(tokens, group, cache)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    size = min(HEAD_TOKENS, hidden.shape[0])
    fill = -hidden.shape[0] % size
    slices = jnp.pad(hidden, ((0, fill), (0, 0))).reshape(-1, size, hidden.shape[-1])
    wanted = jnp.pad(targets.reshape(-1), (0, fill)).reshape(-1, size)

    def of_slice(xs: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, wanted = xs
        logits = model.llm.logits(hidden[None])[0]
        chosen = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=1)

    logprobs = jax.lax.map(of_slice, (slices, wanted)).reshape(-1)
    return logprobs[: targets.size].reshape(targets.shape)


_log_softmax = jax.jit(jax.nn.log_softmax)


def _check_answers(answers: Sequence[Sequence[Sequence[int]]], rows: int, vocab_size: int) -> None:
    if len(answers) != rows:
        raise ConfigError(
            f"{len(answers)} lists of answers do not go with {rows} prompts. One list for each "
            "real row fits."
        )
    for row in answers:
        for answer in row:
            if len(answer) == 0 or min(answer) < 0 or max(answer) >= vocab_size:
                raise ConfigError(
                    f"The answer {list(answer)[:20]} cannot be scored. At least one token (EOS), "
                    f"each from 0 to {vocab_size - 1}, fits."
                )
