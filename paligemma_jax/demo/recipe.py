"""A training recipe (configs/demo.py) as typed values."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.config import GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.demo.batches import BatchConfig, PictureConfig
from paligemma_jax.demo.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that configs/demo.py says; the comments there explain each field."""

    seed: int
    total_steps: int
    model: dict[str, Any]
    batch: BatchConfig
    optimizer: OptimizerConfig
    loc_sigma: float
    pair_weight: float
    patch_steps: int
    patch_weight: float
    log_every: int
    evaluate_every: int
    checkpoint_every: int

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Recipe":
        """Raises TypeError for fields that are missing or unknown."""
        values: dict[str, Any] = config.to_dict()
        batch = BatchConfig(**values.pop("batch"))
        optimizer = OptimizerConfig(**values.pop("optimizer"))
        return cls(batch=batch, optimizer=optimizer, **values)

    def architecture(self, vocab_size: int) -> PaliGemmaConfig:
        """The model's, with a vocabulary of `vocab_size` pieces."""
        return PaliGemmaConfig(
            img=SigLIPConfig(**self.model["img"]),
            llm=GemmaConfig(vocab_size=vocab_size, **self.model["llm"]),
            text_length=self.model["text_length"],
        )

    @property
    def picture(self) -> PictureConfig:
        """Size of the pictures and of their grid of patches."""
        size = self.model["img"]["image_size"]
        return PictureConfig(size=size, side=size // self.model["img"]["patch_size"])
