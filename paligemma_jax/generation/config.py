"""The decoding configuration that all kinds of generation share, and the checks of its values."""

import dataclasses
import difflib
import math
import numbers
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_jax.errors import CheckpointError, ConfigError
from paligemma_jax.generation.constraints import Constraint
from paligemma_jax.generation.sampling import Sampler
from paligemma_jax.generation.token_statistics import TokenStatistics
from paligemma_jax.processing.tokenizer import Tokenizer

MAX_NEW_TOKENS = 128
MAX_CONTEXT = 8192  # tokens, Gemma's
MAX_TOP_LOGPROBS = 64
NUM_BEAMS = 4
MAX_BEAMS = 256
Number = float | int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How sequences are decoded: one object for `generate`, `stream`, `best_of`, `beam_search` ...

    Every field is also a keyword argument of these; a method ignores the fields of a `config` that
    it has no use for, and rejects such keywords. Values are data of the compiled functions: other
    values compile nothing again. Fields marked * may also be a sequence of one value per prompt.

    Attributes:
      max_new_tokens: * at which number of tokens a sequence is cut.
      min_new_tokens: * EOS is not allowed before so many tokens, unless the constraint allows
        nothing else; a stop string still ends a sequence.
      temperature: * 0 decodes greedily, 1 samples from the model's distribution, more flattens it.
        The default is 0, or 1 where `top_k`, `top_p` or `min_p` is given.
      top_k: * sample from the k most probable tokens and their equals.
      top_p: * sample from the most probable tokens that together have this probability; the token
        that crosses it is one of them (big_vision's nucleus).
      min_p: * sample from tokens at least so many times as probable as the most probable one. The
        order is temperature, top_k, top_p, min_p, each after the one before has renormalized.
      seed: * from 0 to 2**64 - 1. With one number prompt i samples with seed + i; a sequence's
        samples depend on its own seed alone.
      stop: a text or several at which a sequence ends, cut before it; * a list of such lists.
      eos_token_id: the id or ids that end a sequence, () for none; * a list of such lists.
      sampler: an own `Sampler` in place of temperature, top_k, top_p and min_p.
      constraint: * which tokens may come next, such as `allowed_answers`.
      token_statistics: what to measure at every token; see `Generation.extras`.
      top_logprobs: number of most probable tokens to report for every step.
      num_beams: width of `beam_search`, by default 4, at most 256.
      length_penalty: `beam_search` and `best_of` rank by logprob / tokens ** length_penalty: 0
        ranks by probability, which favors short sequences, 1 by the mean log-probability.
      early_stopping: True is big_vision's rule of `beam_search`: every beam may end at each step,
        and only beams that end count. False is Hugging Face's: a beam may end where EOS is among
        the `num_beams` best continuations, and one that is cut counts, too.
      num_return_sequences: sequences that `beam_search` returns for a prompt, at most; up to
        `num_beams`.
    """

    max_new_tokens: int | Sequence[int] = MAX_NEW_TOKENS
    min_new_tokens: int | Sequence[int] = 0
    temperature: Number | Sequence[Number | None] | None = None
    top_k: int | Sequence[int | None] | None = None
    top_p: Number | Sequence[Number | None] | None = None
    min_p: Number | Sequence[Number | None] | None = None
    seed: int | Sequence[int] = 0
    stop: str | Sequence[str | Sequence[str] | None] | None = None
    eos_token_id: int | Sequence[int | Sequence[int] | None] = Tokenizer.eos_id
    sampler: Sampler | None = None
    constraint: Constraint | Sequence[Constraint] | None = None
    token_statistics: TokenStatistics | None = None
    top_logprobs: int = 0
    num_beams: int | None = None
    length_penalty: Number = 0.0
    early_stopping: bool = True
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, _plain(value))
        check_values(vars(self))
        for name in _LISTS:  # a prompt's own stay lists of one a prompt, however few are chosen
            value = getattr(self, name)
            if _is_per_prompt(name, value):
                object.__setattr__(self, name, tuple(map(_as_tuple, value)))

    @property
    def samples(self) -> bool:
        """Whether any sequence is sampled rather than decoded greedily."""
        count = common_length(vars(self)) or 1
        return self.sampler is not None or any(self.values("temperature", count))

    def select(self, indices: Sequence[int], count: int) -> "GenerationConfig":
        """The same for some of `count` prompts, each with its own seed.

        Raises ConfigError for fields with a value for each of another number of prompts.
        """
        common_length(vars(self), count)
        chosen = {
            name: tuple(value[i] for i in indices)
            for name, value in vars(self).items()
            if _is_per_prompt(name, value)
        }
        if isinstance(self.seed, int):
            chosen["seed"] = tuple((self.seed + i) % 2**64 for i in indices)
        return dataclasses.replace(self, **chosen)

    def values(self, name: str, count: int) -> list[Any]:
        """One value of a field for each of `count` prompts."""
        value = getattr(self, name)
        if name in _LISTS and not _is_per_prompt(name, value):
            value = _as_tuple(value)
        found = list(value) if _is_per_prompt(name, value) else [value] * count
        if name == "temperature" and None in found:
            filters = zip(*(self.values(other, count) for other in _FILTERS[1:]), strict=True)
            default = [0.0 if all(other is None for other in row) else 1.0 for row in filters]
            found = [d if t is None else t for t, d in zip(found, default, strict=True)]
        return found


def _plain(value: Any) -> Any:
    """Lists as tuples, and numbers of NumPy as those of Python."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _is_per_prompt(name: str, value: Any) -> bool:
    if name not in _PER_PROMPT or not isinstance(value, list | tuple):
        return False
    if name in _LISTS:  # lists themselves; a list of lists is one per prompt
        return any(isinstance(entry, list | tuple) for entry in value)
    return True


def common_length(values: Mapping[str, Any], count: int | None = None) -> int | None:
    """Of all fields that have one value per prompt, None without any; it must be `count`."""
    for name, value in values.items():
        if _is_per_prompt(name, value):
            count = len(value) if count is None else count
            if len(value) != count or not count:
                raise ConfigError(
                    f"{name}: expected one value, or a list of one for each of {count} prompts, "
                    f"got a list of {len(value)}."
                )
    return count


@dataclasses.dataclass(frozen=True)
class _Range:
    """The check of a number; it returns what was expected, or None."""

    kind: type
    low: Number
    high: Number = math.inf  # of whole numbers only
    optional: bool = False

    def __call__(self, value: Any) -> str | None:
        is_number = isinstance(value, self.kind) and not isinstance(value, bool)
        if is_number and self.low <= value <= self.high:
            return None
        if self.optional and value is None:
            return None
        what = "a whole number" if self.kind is numbers.Integral else "a finite number"
        if self.high < math.inf:
            return f"{what} from {self.low:g} to {self.high:,}"
        return f"{what} of at least {self.low:g}"


def _texts(value: Any) -> str | None:
    texts = [value] if isinstance(value, str) else value
    if texts is None or isinstance(texts, list | tuple):
        if all(isinstance(text, str) and text for text in texts or ()):
            return None
    return "a text, or a list of texts, none of them empty"


def _ids(value: Any) -> str | None:
    ids = value if isinstance(value, list | tuple) else [value]
    return "an id, or a list of ids" if any(map(_Range(numbers.Integral, 0), ids)) else None


def _instance(kind: Any, what: str) -> Callable[[Any], str | None]:
    return lambda value: None if value is None or isinstance(value, kind) else what


_INT, _FLOAT = numbers.Integral, numbers.Real
_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "max_new_tokens": _Range(_INT, 1, MAX_CONTEXT),
    "min_new_tokens": _Range(_INT, 0, MAX_CONTEXT),
    "temperature": _Range(_FLOAT, 0, 1e30, optional=True),
    "top_k": _Range(_INT, 1, 2**31 - 1, optional=True),
    "top_p": _Range(_FLOAT, 0, 1, optional=True),
    "min_p": _Range(_FLOAT, 0, 1, optional=True),
    "seed": _Range(_INT, 0, 2**64 - 1),
    "stop": _texts,
    "eos_token_id": _ids,
    "sampler": _instance(Sampler, "a Sampler, such as Chain((Temperature(), TopK(k=40)))"),
    "constraint": _instance(Constraint, "a Constraint, such as allowed_answers(tokenizer, [...])"),
    "token_statistics": _instance(TokenStatistics, "a TokenStatistics, or None"),
    "top_logprobs": _Range(_INT, 0, MAX_TOP_LOGPROBS),
    "num_beams": _Range(_INT, 1, MAX_BEAMS, optional=True),
    "length_penalty": _Range(_FLOAT, -9, 9),  # powers of a length that float32 can hold
    "early_stopping": lambda v: None if isinstance(v, bool) else "True or False",
    "num_return_sequences": _Range(_INT, 1, MAX_BEAMS),
}
_FIELDS = tuple(_CHECKS)
_PER_PROMPT = frozenset(_FIELDS[:9]) | {"constraint"}
_LISTS = ("stop", "eos_token_id")  # whose value for one prompt may be a list
_FILTERS = ("temperature", "top_k", "top_p", "min_p")
_DECODING = {"max_new_tokens", "min_new_tokens", "eos_token_id", "constraint"}
_MEASURING = {"stop", "token_statistics", "top_logprobs"}
_SAMPLING = {*_FILTERS, "seed", "sampler"}
_BEAMS = {"num_beams", "length_penalty", "early_stopping", "num_return_sequences"}
METHOD_FIELDS: dict[str, set[str]] = {  # which fields a method takes
    "generate": _DECODING | _MEASURING | _SAMPLING,
    "stream": _DECODING | _MEASURING | _SAMPLING,
    "best_of": _DECODING | _MEASURING | _SAMPLING | {"length_penalty"},
    "beam_search": _DECODING | _BEAMS,
    "prompt_lookup_generate": _DECODING | _MEASURING,
}


def check_values(values: Mapping[str, Any]) -> None:
    """Raises ConfigError for the first value that a field cannot have."""
    for name, value in values.items():
        each = _is_per_prompt(name, value)
        for entry in value if each else [value]:
            if each and entry is None and name in _LISTS:
                continue
            expected = _CHECKS[name](entry)
            if each and entry is None and name == "constraint":
                expected = "a Constraint for each prompt, or one call for the prompts without"
            if expected:
                raise ConfigError(f"{name}: expected {expected}, got {_shown(entry)}.")
    count = common_length(values) or 1
    low, high = values.get("min_new_tokens", 0), values.get("max_new_tokens", MAX_NEW_TOKENS)
    lows, highs = (v if isinstance(v, list | tuple) else [v] * count for v in (low, high))
    for least, most in zip(lows, highs, strict=True):
        if least > most:
            raise ConfigError(
                f"min_new_tokens: expected at most max_new_tokens, {most}, got {least}. Pass "
                f"max_new_tokens={least} or more."
            )
    beams = values.get("num_beams") or NUM_BEAMS
    if (returned := values.get("num_return_sequences", 1)) > beams:
        raise ConfigError(
            f"num_return_sequences: expected at most num_beams, {beams}, got {returned}. Pass "
            f"num_beams={returned} or more."
        )
    given = [name for name in _FILTERS if values.get(name) is not None]
    if values.get("sampler") is not None and given:
        raise ConfigError(
            f"expected a sampler or {given[0]}, got both. Put the value into the sampler: "
            "Chain((Temperature(temperature=0.7), TopP(p=0.9)))"
        )


def _shown(value: Any) -> str:
    try:
        return repr(value)[:200]
    except ValueError:  # Python prints no integers of thousands of digits
        return "a number of thousands of digits"


_MEANT = {  # names of other libraries, and what they are here
    "nucleus": "top_p", "nucleus_p": "top_p", "p": "top_p", "k": "top_k", "topk": "top_k",
    "topp": "top_p", "temp": "temperature", "beams": "num_beams", "beam_size": "num_beams",
    "beam_width": "num_beams", "max_length": "max_new_tokens", "max_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens",
    "max_decode_len": "max_new_tokens", "max_gen_len": "max_new_tokens",
    "min_length": "min_new_tokens", "min_tokens": "min_new_tokens", "stop_strings": "stop",
    "stop_sequences": "stop", "stop_words": "stop", "alpha": "length_penalty",
    "random_seed": "seed", "rng": "seed", "eos_id": "eos_token_id", "eos": "eos_token_id",
    "stop_token_ids": "eos_token_id", "observer": "token_statistics", "prefix": "answer_prefixes",
    "logits_processor": "sampler", "grammar": "constraint", "samples": "n", "best_of": "n",
}  # fmt: skip
_EXPLAINED = {
    "do_sample": "temperature decides: 0, the default, decodes greedily, 1.0 samples",
    "logprobs": "every Generation has logprobs; for those of other tokens pass top_logprobs",
    "output_scores": "every Generation has logprobs; for those of other tokens pass top_logprobs",
    "suppress_tokens": "pass constraint=forbid_tokens(ids, vocab_size)",
    "bad_words_ids": "pass constraint=forbid_tokens(ids, vocab_size) for single tokens",
    "n": "call best_of(..., n=...) for several samples of each prompt",
} | dict.fromkeys(
    ("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size"),
    "not supported; an own Constraint can forbid tokens",
)


def resolve_config(
    method: str,
    config: GenerationConfig | None,
    settings: Mapping[str, Any],
    *,
    also: Sequence[str] = (),
) -> GenerationConfig:
    """`config` with keyword arguments of `method` put into it.

    Raises ConfigError, before anything is computed, for names that `method` does not take (with the
    name that was probably meant; `also` are its other keywords) and values that a field cannot
    have.
    """
    config = config or GenerationConfig()
    takes = METHOD_FIELDS[method]
    for name in settings:
        if name not in takes:
            raise ConfigError(_unknown(method, name, [*takes, *also]))
    if not settings:
        return config
    if settings.get("sampler") is not None:  # replaces values that a checkpoint brought
        config = dataclasses.replace(config, **dict.fromkeys(_FILTERS))
    elif any(settings.get(name) is not None for name in _FILTERS):
        config = dataclasses.replace(config, sampler=None)
    settings = {name: _plain(value) for name, value in settings.items()}
    check_values(vars(config) | settings)
    return dataclasses.replace(config, **settings)


def _unknown(method: str, name: str, names: Sequence[str]) -> str:
    if name in _EXPLAINED:
        return f"{method}() does not take {name!r}: {_EXPLAINED[name]}."
    meant = _MEANT.get(name, name)
    if meant in names:
        return f"{method}() does not take {name!r}. Did you mean {meant!r}?"
    others = [other for other, takes in METHOD_FIELDS.items() if meant in takes]
    if others:
        return f"{method}() does not take {name!r}; {meant!r} is for {' and '.join(others)}."
    near = difflib.get_close_matches(name.lower(), sorted(names), n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"It takes {', '.join(sorted(names))}."
    return f"{method}() does not take {name!r}. {hint}"


# Of a Hugging Face generation_config.json: fields that leave an answer as it is, and those that do
# so with one value.
_SILENT = frozenset(
    "bos_token_id pad_token_id transformers_version _from_model_config use_cache "
    "cache_implementation cache_config return_dict_in_generate output_scores output_logits "
    "output_attentions output_hidden_states return_legacy_cache disable_compile compile_config "
    "is_assistant prompt_lookup_num_tokens max_matching_ngram_size max_time".split()
)
_NEUTRAL = {"max_length": 20} | dict.fromkeys(
    "repetition_penalty encoder_repetition_penalty length_penalty guidance_scale typical_p "
    "num_beams num_beam_groups num_return_sequences".split(),
    1,
)  # and for all fields None, False and 0


def from_hugging_face(values: Mapping[str, Any], path: str | os.PathLike[str]) -> GenerationConfig:
    """The meaning of generation_config.json, of the checkpoint at `path`.

    Honored are eos_token_id, max_new_tokens, min_new_tokens, and with do_sample temperature, top_k,
    top_p and min_p, with the defaults of transformers (top_k 50). Everything else that would change
    an answer is named in one warning. Raises CheckpointError for values that a field cannot have.
    """
    known = {n: values.get(n) for n in ("eos_token_id", "max_new_tokens", "min_new_tokens")}
    settings = {n: value for n, value in known.items() if value is not None}
    if values.get("do_sample"):
        sampling: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None}
        sampling |= {n: values[n] for n in sampling if values.get(n) is not None}
        if sampling["top_k"] == 0:  # transformers' word for all tokens
            sampling["top_k"] = None
        settings |= sampling
    handled = {*known, *_SILENT, *_FILTERS, "do_sample", "early_stopping"}
    ignored = [
        n for n, v in values.items() if n not in handled and v not in (None, 0, _NEUTRAL.get(n))
    ]
    if ignored:
        changed = ", ".join(f"{n}={values[n]!r}"[:80] for n in ignored[:20])
        hint = " For beam search call beam_search()." if "num_beams" in ignored else ""
        warnings.warn(
            f"generation_config.json of {path} asks for {changed}, which is not supported "
            f"here.{hint}",
            stacklevel=2,
        )
    try:
        return resolve_config("generate", None, settings)
    except ConfigError as e:
        raise CheckpointError(f"generation_config.json of {path}: {e}") from e


def to_hugging_face(config: GenerationConfig) -> dict[str, Any]:
    """What generation_config.json can say of a configuration, beyond the defaults."""
    names = ("eos_token_id", "max_new_tokens", "min_new_tokens")
    values = {n: getattr(config, n) for n in names}
    values = {n: v for n, v in values.items() if v != getattr(GenerationConfig, n)}
    if config.samples and config.sampler is None:
        values |= {"do_sample": True, "top_k": config.top_k or 0}
        values["temperature"] = 1.0 if config.temperature is None else config.temperature
        values |= {n: getattr(config, n) for n in ("top_p", "min_p") if getattr(config, n)}
    return values
