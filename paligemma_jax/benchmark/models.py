"""Names of the models that can be measured: the published ones, and three smaller ones."""

import dataclasses

from paligemma_jax.config import GEMMA_2B, VARIANTS, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.errors import ConfigError

# Four layers of PaliGemma 3B each side and a small table: 0.6 billion parameters, which fit a
# laptop and still take all of their time for what the large ones take theirs for.
MID = PaliGemmaConfig(
    img=SigLIPConfig(depth=4),
    llm=dataclasses.replace(GEMMA_2B, depth=4, vocab_size=32_768),
)
# Half of that, which 8 GB are enough to train all of.
SMALL = dataclasses.replace(
    MID,
    img=dataclasses.replace(MID.img, depth=2),
    llm=dataclasses.replace(MID.llm, depth=2),
)
# For trying the benchmark itself.
TINY = PaliGemmaConfig(
    img=SigLIPConfig(image_size=56, width=64, depth=2, mlp_dim=128, num_heads=4),
    llm=dataclasses.replace(
        GEMMA_2B,
        width=64,
        depth=2,
        mlp_dim=128,
        num_heads=4,
        head_dim=16,
        query_scale=16**-0.5,
        vocab_size=512,
    ),
)
MODELS: dict[str, PaliGemmaConfig] = {"tiny": TINY, "small": SMALL, "mid": MID, **VARIANTS}


def find_model(name: str) -> PaliGemmaConfig:
    """The architecture of a model's name; raises ConfigError for an unknown one."""
    if name not in MODELS:
        raise ConfigError(
            f"There is no model {name!r} to measure. tiny, small, mid and the published names fit. "
            "List them with: paligemma info --list"
        )
    return MODELS[name]
