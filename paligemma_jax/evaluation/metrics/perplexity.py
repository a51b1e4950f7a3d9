"""How likely the right text is to the model."""

from typing import Any

import numpy as np

from paligemma_jax.evaluation.metrics.accumulator import Values
from paligemma_jax.evaluation.metrics.misfit import check_number
from paligemma_jax.evaluation.metrics.pairing import Examples
from paligemma_jax.evaluation.metrics.totals import Totals, TotalsAccumulator


class Perplexity(TotalsAccumulator):
    """Negative log-likelihood of the right answers, in nats.

    An example is a pair: its log-probability, summed over its tokens (at most 0), as the
    "prediction", and how many tokens those are (at least 1), as the "reference". `nll`: mean per
    example; `nll_per_token`: mean over examples of each one's mean per token, which big_vision
    calls `avg` of its perplexity; `nll_of_all_tokens`: all nats by all tokens; `perplexity`: exp of
    that, from 1 up (Jelinek et al. 1977).
    """

    main = "logprob_per_token"
    fits = "A log-probability in nats (at most 0) and a number of tokens (at least 1) fit."

    def _row(self, prediction: Any, reference: Any) -> dict[str, float]:
        tokens = check_number(reference, "number of tokens", low=1)
        # The other way round, so that one check is enough: at most 0, finite.
        nll = check_number(_negated(prediction), "negative log-probability", low=0)
        return {"nll": nll, "tokens": tokens, "logprob_per_token": -nll / tokens}

    def _finish(self, totals: Totals) -> Values:
        together = totals.ratio("nll", "tokens")
        return {
            "nll": totals.mean("nll"),
            "nll_per_token": -totals.mean("logprob_per_token"),
            "nll_of_all_tokens": together,
            "perplexity": np.exp(np.minimum(together, 700)),  # beyond, there is no such float
        }


def perplexity(logprobs: Examples[float], tokens: Examples[int]) -> dict[str, float]:
    """`Perplexity` of lists or mappings; raises DatasetError."""
    return Perplexity().add_all(logprobs, tokens).result()


def _negated(value: Any) -> Any:
    return -value if isinstance(value, float | int | np.floating | np.integer) else value
