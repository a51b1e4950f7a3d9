"""Every published variant has exactly the published number of weights."""

import functools
import math

import jax
import pytest

from paligemma_jax.config import (
    GEMMA2_2B,
    GEMMA2_9B,
    GEMMA2_27B,
    GEMMA_2B,
    VARIANTS,
    GemmaConfig,
    PaliGemmaConfig,
    SigLIPConfig,
)
from paligemma_jax.models.paligemma import abstract_params, parameter_count

# Of big_vision's models; that of the first equals Hugging Face's 2,923,466,480 less the 64 filler
# rows (of 2048) in its embedding table.
TOTALS = {
    (GEMMA_2B, 224): 2_923_335_408,
    (GEMMA_2B, 448): 2_924_220_144,
    (GEMMA_2B, 896): 2_927_759_088,
    (GEMMA2_2B, 224): 3_032_094_960,
    (GEMMA2_2B, 448): 3_032_979_696,
    (GEMMA2_2B, 896): 3_036_518_640,
    (GEMMA2_9B, 224): 9_662_409_456,
    (GEMMA2_9B, 448): 9_663_294_192,
    (GEMMA2_9B, 896): 9_666_833_136,
    (GEMMA2_27B, 224): 27_650_192_112,
    (GEMMA2_27B, 448): 27_651_076_848,
    (GEMMA2_27B, 896): 27_654_615_792,
}
# img with its head, the head alone, llm, and the embedding table, at 224
PARTS = {
    GEMMA_2B: (414_803_696, 2_361_344, 2_508_531_712, 526_647_296),
    GEMMA2_2B: (415_098_864, 2_656_512, 2_616_996_096, 592_478_208),
    GEMMA2_9B: (416_574_704, 4_132_352, 9_245_834_752, 921_632_768),
    GEMMA2_27B: (417_755_376, 5_313_024, 27_232_436_736, 1_184_956_416),
}


@functools.cache
def total(img: SigLIPConfig, llm: GemmaConfig) -> int:
    return parameter_count(PaliGemmaConfig(img=img, llm=llm))


@pytest.mark.parametrize("llm, resolution", TOTALS)
def test_total(llm: GemmaConfig, resolution: int):
    assert total(SigLIPConfig(image_size=resolution), llm) == TOTALS[llm, resolution]


def test_every_published_name():
    for config in VARIANTS.values():
        assert total(config.img, config.llm) == TOTALS[config.llm, config.img.image_size]


@pytest.mark.parametrize("llm", PARTS)
def test_parts(llm: GemmaConfig):
    params = abstract_params(PaliGemmaConfig(img=SigLIPConfig(), llm=llm))
    parts = (
        params["img"],
        params["img"]["head"],
        params["llm"],
        params["llm"]["embedder"]["input_embedding"],
    )
    counts = tuple(sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for part in parts)
    assert counts == PARTS[llm]
    assert len(jax.tree.leaves(params)) == (34 if llm.post_norms else 32)
