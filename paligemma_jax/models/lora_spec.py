"""What adapters a model gets: `LoRA` (arXiv 2106.09685)."""

import dataclasses
import math
import re

from paligemma_jax.errors import ConfigError

LANGUAGE_MODEL = "llm/layers/.*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Adapters of low rank: w + scale * a @ b beside each targeted weight w.

    Attributes:
      rank: inner width of a @ b.
      alpha: the scale is alpha / rank; None makes it the rank, a scale of 1.
      rslora: the scale is alpha / sqrt(rank) instead (arXiv 2312.03732).
      dropout: share of an adapter's inputs that is dropped in training; see `with_dropout`.
      targets: regular expression that must match a whole path, such as
        "llm/layers/attn/q_einsum" or "img/blocks/mlp/fc1". Weights that join two have a path for
        each too: "llm/layers/attn/kv_einsum/k" and ".../v", "llm/layers/mlp/gating_einsum/gate" and
        ".../up". The default is every product of the language model's layers;
        "(llm/layers|img)/.*" has those of the image encoder, and its projection, too.
    """

    rank: int = 8
    alpha: int | float | None = None
    rslora: bool = False
    dropout: int | float = 0.0
    targets: str = LANGUAGE_MODEL

    def __post_init__(self) -> None:
        problems = []
        if not self.rank >= 1:
            problems.append(f"rank is {self.rank}; 1 or more fits")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            problems.append(f"alpha is {self.alpha}; a positive number fits")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout}; a share from 0 to less than 1 fits")
        try:
            re.compile(self.targets)
        except re.error as e:
            problems.append(f"targets {self.targets!r} is no regular expression ({e})")
        if problems:
            raise ConfigError(
                f"These adapters cannot be made: {'; '.join(problems)}. Try "
                f"LoRA(rank=8, alpha=16, targets={LANGUAGE_MODEL!r})."
            )

    @property
    def scale(self) -> float:
        """What a @ b is multiplied by."""
        return scale_of(self.rank, self.rank if self.alpha is None else self.alpha, self.rslora)


def scale_of(rank: int, alpha: int | float, rslora: bool) -> float:
    """The factor of an adapter of this rank."""
    return alpha / (math.sqrt(rank) if rslora else rank)
