"""When the answers of a beam search end: small frozen dataclasses, one rule each."""

import dataclasses
from typing import TypeAlias


@dataclasses.dataclass(frozen=True)
class EndAnytime:
    """big_vision's rule: every beginning might end at each step, however unlikely that is.

    Only answers that end count.
    """


@dataclasses.dataclass(frozen=True)
class EndWhenRanked:
    """Hugging Face's rule: an answer may end where EOS is among the likeliest continuations.

    As many are looked at as beginnings are followed. What has not ended when it is cut counts as it
    is. With one beam and no normalization by length this is `Greedy`.
    """


Ending: TypeAlias = EndAnytime | EndWhenRanked
