"""By what answers are ranked, whether they were drawn or searched for."""


def answer_score(logprob: float, length: int, alpha: float) -> float:
    """logprob / length ** alpha: the higher, the better.

    0 ranks by probability, which favours short answers, 1 by the mean log-probability of a token.
    `length` counts all tokens, EOS included; as Hugging Face's `length_penalty`.
    """
    return logprob / length**alpha
