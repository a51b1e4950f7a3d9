"""Log-probabilities of given answers: image and prompt are read once, all answers share them.

An answer is causal and the prefix never sees it, so reading the prefix once is exact: every answer
gets what a forward pass over image, prompt and that answer alone would give it. Answers of
different lengths stand side by side in few sequences of few widths, without much padding.

Letters: B prompts, T tokens of a pack of answers, W decoder width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.generation.decode import read_prompts
from paligemma_jax.generation.generate import real_sequences
from paligemma_jax.generation.image_embeddings import BATCH_SIZE, prompt_batches
from paligemma_jax.models.kv_cache import KVCache
from paligemma_jax.models.layers import Jitted
from paligemma_jax.models.paligemma import PaliGemma
from paligemma_jax.processing.processor import Batch, Processor, bucket
from paligemma_jax.processing.prompts import candidate_tokens, check_labels

TOKENS_AT_ONCE = 512  # of all prompts together; bounds memory, not the number of answers
MIN_WIDTH = 16
PADDING = -1


@dataclasses.dataclass(frozen=True)
class Pack:
    """Answers side by side: every token but the last (EOS), with the token that follows it.

    Attributes:
      tokens: i32[B, T].
      segment_ids: i32[B, T], number of the answer that a token belongs to; -1 on padding.
      targets: i32[B, T], the next token of the same answer.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    targets: np.ndarray


def pack(answers: Sequence[Sequence[Sequence[int]]], batch: int) -> Iterator[Pack]:
    """Packs the answers (ending in EOS) of each of `batch` prompts; those of EOS alone need none.

    Widths are powers of two, at least 16, at most 512 divided by `batch` or what the longest answer
    needs; so the programs that read packs are few, whatever the number of answers.
    """
    longest = max((len(answer) - 1 for own in answers for answer in own), default=0)
    limit = max(bucket(longest, MIN_WIDTH), TOKENS_AT_ONCE // bucket(batch))
    waiting = [[(n, a) for n, a in enumerate(own) if len(a) > 1][::-1] for own in answers]
    while any(waiting):
        shape = (batch, limit)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        segment_ids = np.full(shape, PADDING, np.int32)
        used = 0
        for i, own in enumerate(waiting):
            start = 0
            while own and start + len(own[-1][1]) - 1 <= limit:
                number, answer = own.pop()
                columns = slice(start, start + len(answer) - 1)
                tokens[i, columns], targets[i, columns] = answer[:-1], answer[1:]
                segment_ids[i, columns] = number
                start = columns.stop
            used = max(used, start)
        width = bucket(used, MIN_WIDTH)
        yield Pack(tokens[:, :width], segment_ids[:, :width], targets[:, :width])


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
    batch_size: int = BATCH_SIZE,
    allow_urls: bool = False,
) -> list[list[ScoredAnswer]]:
    """Scores the candidate answers (one list of texts a prompt), in the order given.

    `images` is as in `Pipeline.generate`; entries may be EncodedImages. An empty candidate is the
    empty answer, EOS alone; one that comes twice is scored twice. A candidate is tokenized in the
    one way that training would; other pieces that spell the same text are not counted.

    Raises:
      InvalidImageError, InvalidPromptError: naming what is wrong: a prompt without candidates, a
        candidate that is not a text, or one that is too long behind its prompt.
    """
    if not isinstance(prompts, str) and len(candidates) != len(prompts):
        raise InvalidPromptError(
            f"candidates: expected a list for each of {len(prompts)} prompts, got "
            f"{len(candidates)}."
        )
    scored: dict[int, list[ScoredAnswer]] = {}
    options: dict[str, Any] = dict(batch_size=batch_size, allow_urls=allow_urls)
    for chosen in prompt_batches(model, processor, images, prompts, **options):
        lengths = np.sum(np.asarray(chosen.batch.mask_input), axis=1).tolist()
        texts = [candidates[i] for i in chosen.indices]
        answers = [
            candidate_tokens(processor, own, length)
            for own, length in zip(texts, lengths, strict=False)
        ]
        found = score_tokens(model, chosen.batch, answers, chosen.image_tokens)
        for index, *of_prompt in zip(chosen.indices, texts, answers, found, strict=True):
            scored[index] = [
                ScoredAnswer(text, tuple(tokens), logprobs)
                for text, tokens, logprobs in zip(*of_prompt, strict=True)
            ]
    return [scored[i] for i in range(len(prompts))]


def score_tokens(
    model: PaliGemma,
    batch: Batch,
    answers: Sequence[Sequence[Sequence[int]]],
    image_tokens: jax.Array | None = None,
) -> list[list[tuple[float, ...]]]:
    """Log-probability (nats) of every token of every answer (ending in EOS) to each real prompt.

    `image_tokens` as in `generate`. Memory does not grow with the number of answers: they are read
    some hundred tokens at a time. Raises ConfigError for answers that do not match the batch.
    """
    mask = real_sequences(batch)
    real = np.flatnonzero(mask)
    _check_answers(answers, real.size, model.config.llm.vocab_size)
    placed: list[Sequence[Sequence[int]]] = [()] * mask.size
    for sequence, own in zip(real, answers, strict=True):
        placed[sequence] = own
    logits, cache = read_prompts(model, batch, image_tokens)
    first = np.asarray(_log_softmax(logits))
    scored = [[[float(first[i, answer[0]])] for answer in own] for i, own in enumerate(placed)]
    for p in pack(placed, mask.size):
        arrays = [jnp.asarray(x) for x in (p.tokens, p.segment_ids, p.targets)]
        logprobs = np.asarray(packed_logprobs(model, *arrays, cache=cache))
        for i, own in enumerate(p.segment_ids):
            for number in set(own.tolist()) - {PADDING}:
                scored[i][number] += logprobs[i, own == number].tolist()
    return [[tuple(answer) for answer in scored[i]] for i in real]


@Jitted
def packed_logprobs(
    model: PaliGemma,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    cache: KVCache,
) -> Float[Array, "B T"]:
    """Log-probability (nats) of `targets`, each after its token; logits exist for 64 at a time."""
    hidden = model.packed_continuations(tokens, segment_ids, cache)
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


def _check_answers(answers: Sequence[Sequence[Sequence[int]]], count: int, vocab: int) -> None:
    if len(answers) != count:
        raise ConfigError(
            f"answers: expected a list for each of {count} prompts, got {len(answers)}."
        )
    for answer in (answer for own in answers for answer in own):
        if len(answer) == 0 or min(answer) < 0 or max(answer) >= vocab:
            raise ConfigError(
                f"answers: expected at least one token (EOS), each from 0 to {vocab - 1}, got "
                f"{list(answer)[:20]}."
            )


@dataclasses.dataclass(frozen=True)
class Classification:
    """How an image's labels compare.

    Attributes:
      answers: each label as an answer, in the order asked for.
      probabilities: of each label, given that it is one of them; they sum to 1.
    """

    answers: tuple[ScoredAnswer, ...]
    probabilities: tuple[float, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order asked for."""
        return tuple(answer.text for answer in self.answers)

    @property
    def best(self) -> str:
        """The most probable label, the first of equals."""
        return self.ranked()[0][0]

    @property
    def coverage(self) -> float:
        """Probability that the model, asked freely, answers with one of the labels at all.

        Where it is small the labels are not what the model would say, and `probabilities`
        compare unlikely answers with each other.
        """
        return min(1.0, math.fsum(answer.probability for answer in self.answers))

    def ranked(self) -> list[tuple[str, float]]:
        """Labels and probabilities, most probable first."""
        pairs = zip(self.labels, self.probabilities, strict=True)
        return sorted(pairs, key=lambda pair: -pair[1])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, most probable first."""
        logprobs = {answer.text: answer.logprob for answer in self.answers}
        return {
            "label": self.best,
            "coverage": self.coverage,
            "labels": [
                {"label": label, "probability": probability, "logprob": logprobs[label]}
                for label, probability in self.ranked()
            ],
        }

    def __str__(self) -> str:
        return "\n".join(f"{probability:.3f} {label}" for label, probability in self.ranked())


def classify(answers: Sequence[ScoredAnswer], *, length_normalized: bool = False) -> Classification:
    """Softmax over the log-probabilities of scored labels; they are checked by `check_labels`.

    Of whole answers, EOS included, this is Bayes' rule, given that one of them is it: right for a
    model that was trained to give exactly these answers. EOS is what makes it fair to longer
    labels: "cat" does not get the probability of "cattle", since it has to end. `length_normalized`
    takes the mean log-probability of a token, as GPT-3 was evaluated (arXiv 2005.14165, section
    2.4): for labels that the model was not trained to give, of which long ones would never win;
    what comes out ranks the labels, and is no probability of anything.
    """
    check_labels([answer.text for answer in answers])
    values = [a.logprob / a.length if length_normalized else a.logprob for a in answers]
    weights = [math.exp(value - max(values)) for value in values]
    total = math.fsum(weights)
    return Classification(tuple(answers), tuple(weight / total for weight in weights))
