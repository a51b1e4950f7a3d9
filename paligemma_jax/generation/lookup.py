"""Greedy decoding in fewer passes: guesses looked up in prompt and answer, checked several at once.

Answers of PaliGemma repeat: labels and separators between boxes, words of the prompt, lines of a
table. Prompt lookup (arXiv 2304.04487; speculative decoding, arXiv 2211.17192, with a search in
place of a second model) guesses that what followed the last tokens before will follow them again,
and reads the guesses in one pass through the decoder, which costs little more than one token where
reading the weights is what takes the time. On a CPU with two cores a pass over five tokens took
twice as long as over one (Gemma 2B's layers, float32): there it pays from two tokens a pass on.
tests/generation/lookup_counts.py counts how many the demo model's answers give.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_jax.errors import ConfigError
from paligemma_jax.generation.answers import AnswerSettings, GeneratedTokens
from paligemma_jax.generation.constraint import Constraint
from paligemma_jax.generation.generate import real_rows
from paligemma_jax.generation.lookup_loop import LookupPlan, decode_by_lookup
from paligemma_jax.generation.observer import Observer
from paligemma_jax.generation.prefix import read_prefix
from paligemma_jax.generation.sampling import Greedy
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.batch import Batch
from paligemma_jax.processing.buckets import MIN_TEXT_LENGTH, bucket

GUESSES = 4
LONGEST = 4  # the four corners of a box


@dataclasses.dataclass(frozen=True)
class LookedUpTokens(GeneratedTokens):
    """An answer, and through how many passes it came.

    Attributes:
      passes: through the decoder; that of the prompt gives the first token, every other one token
        and as many more as guesses before it were right.
    """

    passes: int = 0

    @property
    def tokens_a_pass(self) -> float:
        """Tokens that a pass after the prompt's gave: 1.0 if no guess was ever right."""
        return (len(self.tokens) - 1) / (self.passes - 1) if self.passes > 1 else 1.0


def generate_by_lookup(
    model: PaliGemma,
    batch: Batch,
    *,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    eos_id: int = 1,
    constraint: Constraint | Sequence[Constraint] | None = None,
    observer: Observer | None = None,
    image_tokens: jax.Array | None = None,
    guesses: int = GUESSES,
    longest: int = LONGEST,
    kinds: Sequence[tuple[int, int]] = (),
    references: Sequence[Sequence[int]] = (),
) -> list[LookedUpTokens]:
    """What `generate` answers with Greedy, in fewer passes through the decoder.

    Every token is the likeliest one after exactly the tokens before it, as greedy decoding defines
    it, whatever was guessed. The tokens are the same but for rounding: a pass over several tokens
    adds in another order than a pass over one, so two tokens whose logits differ by no more than
    that (1e-6 in float32, 1e-2 in bfloat16) may change places, as they may in a larger batch.

    Args:
      model: the model.
      batch: the prompts; rows go on at different paces, the slowest ends the loop.
      max_new_tokens: as `generate`, like the next five.
      min_new_tokens: see there.
      eos_id: see there.
      constraint: see there.
      observer: see there.
      image_tokens: see there.
      guesses: tokens that are guessed for a pass.
      longest: how many of the last tokens are looked for at most; at least one must be found.
      kinds: ranges of ids (first, and behind the last) that count as equal when looking for
        tokens, such as all locations: a label is then guessed after any four. See `object_kinds`.
      references: tokens for each row that are looked through too, and not shown to the model: other
        answers that this one may resemble, or the pattern of one. See `object_reference`.

    Raises:
      ConfigError: as `generate`; for a negative number of guesses, or nothing to look for; for
        references that do not match the rows.
    """
    settings = AnswerSettings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        sampler=Greedy(),
        eos_id=eos_id,
        constraint=constraint,
        observer=observer,
        stop=None,
    )
    if guesses < 0 or longest < 1:
        raise ConfigError(
            f"{guesses} guesses from the last {longest} tokens cannot be made. 0 or more guesses "
            f"from at least 1 token fit. Leave them out for {GUESSES} from {LONGEST}."
        )
    row_mask = real_rows(batch)
    plan = LookupPlan(
        limit=jnp.asarray(max_new_tokens, jnp.int32),
        eos_id=eos_id,
        guesses=guesses,
        longest=longest,
        kinds=tuple(kinds),
        constraint=settings.constraint_of(row_mask, model.config.llm.vocab_size),
        observer=observer,
    )
    text, lengths = _texts(batch, row_mask, references)
    logits, cache = read_prefix(model, batch, image_tokens, room=settings.capacity + guesses)
    # Rows go on at different paces, so each has a length of its own.
    cache = dataclasses.replace(cache, length=jnp.broadcast_to(cache.length, row_mask.shape))
    answers, _ = decode_by_lookup(
        model,
        plan,
        cache,
        logits,
        jnp.asarray(text),
        jnp.asarray(lengths),
        jnp.asarray(row_mask),
        settings.capacity,
    )
    text, logprobs, passes = map(np.asarray, (answers.text, answers.logprobs, answers.passes))
    count = np.asarray(answers.count)
    evidence = None if answers.evidence is None else np.asarray(answers.evidence)
    return [
        LookedUpTokens(
            tokens=tuple(text[row, lengths[row] : lengths[row] + count[row]].tolist()),
            logprobs=tuple(logprobs[row, : count[row]].tolist()),
            evidence=()
            if evidence is None
            else tuple(map(tuple, evidence[row, : count[row]].tolist())),
            passes=int(passes[row]),
        )
        for row in np.flatnonzero(row_mask)
    ]


def _texts(
    batch: Batch, row_mask: np.ndarray, references: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """References directly followed by prompts, i32[B, T] padded behind, and lengths i32[B]."""
    real = np.flatnonzero(row_mask)
    if references and len(references) != real.size:
        raise ConfigError(
            f"{len(references)} references do not match {real.size} prompts. One list of tokens a "
            "prompt, or none at all, fits. Pass references=[[]] * len(prompts) for empty ones."
        )
    own = dict(zip(real.tolist(), references, strict=False))
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask_input).astype(bool)
    rows = [[*own.get(row, ()), *tokens[row, mask[row]].tolist()] for row in range(len(tokens))]
    lengths = np.array([len(row) for row in rows], np.int32)
    text = np.zeros((len(rows), bucket(max(lengths), MIN_TEXT_LENGTH)), np.int32)
    for padded, row in zip(text, rows, strict=True):
        padded[: len(row)] = row
    return text, lengths
