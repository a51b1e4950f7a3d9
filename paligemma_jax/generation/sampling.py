"""How the next token is chosen: greedily, or sampled from a distribution that was changed before.

Samplers are pytrees whose values are leaves: other values run the same compiled program. Letters:
B batch, V vocabulary.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from paligemma_jax.errors import ConfigError

_SIGN = np.uint32(0x80000000)
_REST = np.uint32(0x7FFFFFFF)


@runtime_checkable
class Sampler(Protocol):
    """Chooses a token for each sequence; `keys` are random keys, fresh at every step.

    A registered pytree, its values leaves; or any hashable callable, which is then compiled in.
    """

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]: ...


@runtime_checkable
class LogitsProcessor(Protocol):
    """Changes a distribution, sequence by sequence."""

    def process(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Logits of the new distribution; -inf for a token that is ruled out."""
        ...


class _Samples:
    """A logits processor that is a sampler, too: it draws from what it leaves."""

    def process(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        raise NotImplementedError

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return sample(self.process(logits), keys)


def _check(name: str, value: Any, low: float | int, high: float | int, example: str) -> None:
    """ConfigError for a number out of its range; what jax puts in its place passes."""
    if not isinstance(value, numbers.Real):
        return
    if not (low <= float(value) <= high and math.isfinite(value)):
        limits = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise ConfigError(f"{name}: expected a number {limits}, got {value}. Call {example}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """The most probable token; the first of equals."""

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return most_probable(logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Temperature(_Samples):
    """Sampling from softmax(logits / temperature)."""

    temperature: float | Any = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.temperature, numbers.Real) and self.temperature == 0:
            raise ConfigError("temperature: expected a positive number, got 0. Call Greedy()")
        example = "Temperature(temperature=0.7), or Greedy()"
        _check("temperature", self.temperature, 0, math.inf, example)

    def process(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        return logits / self.temperature


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(_Samples):
    """Sampling from the `k` most probable tokens, and all as probable as the last of them.

    `k` is one number or i32[B]; `p` of the next two likewise.
    """

    k: int | Any

    def __post_init__(self) -> None:
        _check("k", self.k, 1, math.inf, "TopK(k=40)")

    def process(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        least = _threshold(logits, lambda above: jnp.sum(above, axis=-1) >= self.k)
        return jnp.where(logits >= least[:, None], logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TopP(_Samples):
    """Sampling from the most probable tokens that together have probability `p` (nucleus).

    big_vision's rule: from the most probable on, tokens are taken until their sum reaches `p`. So
    the token that crosses `p` is one of them, and so is every other as probable as that; `p` 0
    leaves the most probable, `p` 1 all. Its nucleus(p, t) is
    Chain((Temperature(temperature=t), TopP(p=p))).
    """

    p: float | Any

    def __post_init__(self) -> None:
        _check("p", self.p, 0, 1, "TopP(p=0.9)")

    def process(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        probabilities = jax.nn.softmax(logits, axis=-1)

        def enough(above: Bool[Array, "B V"]) -> Bool[Array, " B"]:
            return jnp.sum(probabilities, axis=-1, where=above) >= self.p

        least = jnp.where(jnp.asarray(self.p) < 1, _threshold(logits, enough), -jnp.inf)
        return jnp.where(logits >= least[:, None], logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MinP(_Samples):
    """Sampling from tokens at least `p` times as probable as the most probable (arXiv 2407.01082).

    `p` 0 rules out nothing, `p` 1 leaves the most probable and its equals.
    """

    p: float | Any

    def __post_init__(self) -> None:
        _check("p", self.p, 0, 1, "MinP(p=0.05)")

    def process(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        least = jnp.max(logits, axis=-1) + jnp.log(self.p)
        return jnp.where(logits >= least[:, None], logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain(_Samples):
    """Sampling after several changes of the distribution, in the order given.

    Each step sees what the ones before it left, with probabilities that add up to 1 again. So the
    order matters: Chain((Temperature(temperature=0.7), TopK(k=40), TopP(p=0.9))), the order of
    Hugging Face, big_vision and of the settings temperature, top_k and top_p, takes the nucleus of
    the 40 most probable at that temperature; a temperature at the end changes how the kept tokens
    are drawn, not which are kept.
    """

    steps: Sequence[LogitsProcessor] | Any

    def __post_init__(self) -> None:
        if not isinstance(self.steps, Sequence):
            return  # what jax puts in its place
        object.__setattr__(self, "steps", tuple(self.steps))
        wrong = [type(step).__name__ for step in self.steps if isinstance(step, Greedy)]
        if wrong or not self.steps:
            raise ConfigError(
                f"expected Temperature, TopK, TopP or MinP, got {' and '.join(wrong) or 'nothing'}."
                " Call Chain((Temperature(temperature=0.7), TopP(p=0.9)))"
            )

    def process(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        for step in self.steps:
            logits = step.process(logits)
        return logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceSampler:
    """What temperature, top_k, top_p and min_p come to: values of its own for each sequence.

    A filter costs nothing at steps where no sequence of the batch uses it.
    """

    temperature: jax.Array  # f32[B], 0 where a sequence is decoded greedily
    top_k: jax.Array  # i32[B], the largest i32 to keep all
    top_p: jax.Array  # f32[B], 1 to keep all
    min_p: jax.Array  # f32[B], 0 to keep all

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        warm = self.temperature > 0
        x = logits / jnp.where(warm, self.temperature, 1.0)[:, None]
        for step, used in (
            (TopK(k=self.top_k), self.top_k < logits.shape[1]),
            (TopP(p=self.top_p), self.top_p < 1),
            (MinP(p=self.min_p), self.min_p > 0),
        ):
            x = jax.lax.cond(
                jnp.any(used & warm), lambda s, x: s.process(x), lambda _, x: x, step, x
            )
        return jnp.where(warm, sample(x, keys), most_probable(logits))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompiledSampler:
    """A sampler that is no pytree, as part of the program."""

    sampler: Sampler = dataclasses.field(metadata={"static": True})

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return self.sampler(logits, keys)


def as_pytree(sampler: Sampler) -> Sampler:
    """The sampler as an argument of a jitted function."""
    leaves = jax.tree.leaves(sampler)
    return CompiledSampler(sampler) if len(leaves) == 1 and leaves[0] is sampler else sampler


def sequence_sampler(
    temperature: Sequence[float | int],
    top_k: Sequence[int | None],
    top_p: Sequence[float | int | None],
    min_p: Sequence[float | int | None],
) -> Greedy | SequenceSampler:
    """The sampler of a batch; None keeps all. Greedy alone has a program of its own."""
    if not any(temperature):
        return Greedy()
    return SequenceSampler(
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray([2**31 - 1 if k is None else k for k in top_k], jnp.int32),
        jnp.asarray([1.0 if p is None else p for p in top_p], jnp.float32),
        jnp.asarray([0.0 if p is None else p for p in min_p], jnp.float32),
    )


def _threshold(logits: Float[Array, "B V"], enough: Any) -> Float[Array, " B"]:
    """The largest logit such that those of at least its size are `enough` (bool[B, V] -> bool[B]).

    The smallest logit where no set is. Found without sorting, by halving the range of float32
    numbers, of which there are 2^32, 32 times: for 257,152 logits a tenth of a sort's time on CPUs.
    """
    ranks = _rank(logits)
    low, high = jnp.min(ranks, axis=-1), jnp.max(ranks, axis=-1)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = high - (high - low) // 2  # above low, as long as they differ
        found = enough(ranks >= middle[:, None])
        return jnp.where(found, middle, low), jnp.where(found, high, jnp.maximum(middle - 1, low))

    low, high = jax.lax.fori_loop(0, 32, halve, (low, high))
    return _value(low)


def _rank(values: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Whole numbers in the order of float32 values: negative floats are ordered backwards."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)


def _value(ranks: UInt[Array, "..."]) -> Float[Array, "..."]:
    """Inverse of `_rank`."""
    bits = jnp.where(ranks >= _SIGN, ranks & _REST, ~ranks)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def most_probable(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The first of the largest logits; `argmax` takes XLA on CPUs five times as long."""
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, index, logits.shape[-1] - 1), axis=-1)


def sample(logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
    """One token a sequence from softmax(logits), with the sequence's own key."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
