import dataclasses
import math

import pytest

from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.models.paligemma import abstract_params, flatten, nest
from paligemma_jax.weights.tensors import expected_shapes


@pytest.mark.parametrize("name", ["pg1", "pg2"])
def test_shapes_are_those_of_the_model(name: str, request: pytest.FixtureRequest):
    config: PaliGemmaConfig = request.getfixturevalue(name)
    model = {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items()}
    assert model == expected_shapes(config)


def test_an_untied_head_is_a_parameter(pg1: PaliGemmaConfig):
    llm = dataclasses.replace(pg1.llm, tie_embeddings=False)
    untied = dataclasses.replace(pg1, llm=llm)
    model = {path: leaf.shape for path, leaf in flatten(abstract_params(untied)).items()}
    assert model == expected_shapes(untied)
    assert model["llm/lm_head/w"] == (llm.vocab_size, llm.width)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("paligemma-3b-pt-224", 2_923_335_408),
        ("paligemma-3b-pt-896", 2_927_759_088),
        ("paligemma2-3b-pt-224", 3_032_094_960),
        ("paligemma2-10b-pt-448", 9_663_294_192),
        ("paligemma2-28b-pt-896", 27_654_615_792),
    ],
)
def test_published_parameter_counts(name: str, count: int):
    shapes = expected_shapes(VARIANTS[name])
    assert sum(math.prod(shape) for shape in shapes.values()) == count
    assert len(shapes) == (34 if "paligemma2" in name else 32)


def test_flatten_is_the_inverse_of_nest():
    flat = {"a/b": 1, "a/c/d": 2, "e": 3}
    assert nest(flat) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(nest(flat)) == flat
