"""Constraints that a user states directly: tokens that may be used, answers that may be given.

Letters: B batch, V vocabulary.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from paligemma_jax.errors import ConfigError, InvalidPromptError
from paligemma_jax.generation.trie import ROOT, TokenTrie, grow
from paligemma_jax.processing.tokenizer import Tokenizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenMask:
    """The same tokens at every step: those where `allowed` is True.

    Without EOS among them every answer is cut at the largest number of tokens.
    """

    allowed: jax.Array | np.ndarray  # bool[V]

    def check(self, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ConfigError for a mask of another vocabulary, or one that allows nothing."""
        allowed = np.asarray(self.allowed)
        if allowed.shape != (vocab_size,):
            raise ConfigError(
                f"A token mask of shape {allowed.shape} does not fit the model. One boolean for "
                f"each of its {vocab_size:,} tokens fits. "
                "Call allow_tokens(ids, pali.processor.tokenizer.vocab_size)"
            )
        if not allowed.any():
            raise ConfigError(
                "The token mask allows no token. At least one, and EOS for answers that end, "
                "fits. Call allow_tokens([*ids, tokenizer.eos_id], tokenizer.vocab_size)"
            )

    def start(self, batch: int, limit: Int[Array, ""]) -> None:
        return None

    def allow(self, state: None, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        return jnp.where(self.allowed, logits, -jnp.inf)

    def advance(self, state: None, token: Int[Array, " B"]) -> None:
        return None


def allow_tokens(ids: Iterable[int], vocab_size: int) -> TokenMask:
    """Only these tokens; raises ConfigError for ids outside the vocabulary."""
    return TokenMask(jnp.asarray(_mark(ids, vocab_size)))


def forbid_tokens(ids: Iterable[int], vocab_size: int) -> TokenMask:
    """Every token but these; raises ConfigError for ids outside the vocabulary."""
    return TokenMask(jnp.asarray(~_mark(ids, vocab_size)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AllowedAnswers:
    """One of a set of whole answers, made by `allowed_answers`.

    Tokens are chosen one by one, so greedy decoding takes the likeliest beginning at each step,
    which need not lead to the likeliest answer: scoring all of them finds that one.
    """

    trie: TokenTrie
    longest: jax.Array  # i32[], tokens, EOS included

    def check(self, vocab_size: int, max_new_tokens: int) -> None:
        """Raises ConfigError for another vocabulary, or if the longest answer would be cut."""
        self.trie.check(vocab_size)
        if max_new_tokens < (longest := int(self.longest)):
            raise ConfigError(
                f"max_new_tokens is {max_new_tokens}, but the longest allowed answer has {longest} "
                f"tokens with its end. At least {longest} fits. Pass max_new_tokens={longest}"
            )

    def start(self, batch: int, limit: Int[Array, ""]) -> Int[Array, " B"]:
        return jnp.full((batch,), ROOT, jnp.int32)

    def allow(self, state: Int[Array, " B"], logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        every_edge = jnp.ones((state.shape[0], self.trie.tokens.shape[-1]), bool)
        return self.trie.reveal(jnp.full_like(logits, -jnp.inf), logits, state, every_edge)

    def advance(self, state: Int[Array, " B"], token: Int[Array, " B"]) -> Int[Array, " B"]:
        return self.trie.next(state, token)


def allowed_answers(tokenizer: Tokenizer, answers: Sequence[str]) -> AllowedAnswers:
    """Exactly one of `answers`, such as "yes" and "no"; "" is the empty answer.

    Raises InvalidPromptError for no answers, and for text that the tokenizer cannot represent.
    """
    if isinstance(answers, str) or not answers:
        raise InvalidPromptError(
            f"The allowed answers are {answers!r}. A list of at least one text fits. "
            "Call allowed_answers(tokenizer, ['yes', 'no'])"
        )
    edges = [{}]
    longest = 0
    for answer in answers:
        path = [*faithful_ids(tokenizer, answer, f"answer {answer!r}"), tokenizer.eos_id]
        grow(edges, ROOT, path)
        longest = max(longest, len(path))
    return AllowedAnswers(
        TokenTrie.pack(edges, tokenizer.vocab_size), jnp.asarray(longest, jnp.int32)
    )


def faithful_ids(tokenizer: Tokenizer, text: str, what: str) -> list[int]:
    """Ids of `text`; InvalidPromptError if they would not decode to it again."""
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:
        raise InvalidPromptError(
            f"The {what} holds characters that the tokenizer cannot represent: it comes back as "
            f"{tokenizer.decode(ids)!r}. Text of the model's own vocabulary fits. "
            "Look with: tokenizer.decode(tokenizer.encode(text))"
        )
    return ids


def _mark(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """True at `ids`, bool[V]."""
    marked = np.zeros(vocab_size, bool)
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"Token {token} is not in a vocabulary of {vocab_size:,}. Ids from 0 to "
                f"{vocab_size - 1} fit. Find them with: tokenizer.encode(text)"
            )
        marked[token] = True
    return marked
