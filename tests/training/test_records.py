"""What a run's settings call records."""

from pathlib import Path

import pytest

import paligemma_jax as pg
from paligemma_jax.data.mixture import Mixture, MixtureComponent
from paligemma_jax.data.sources import SequenceSource
from paligemma_jax.errors import ConfigError
from paligemma_jax.training.config import Data, TrainConfig, first_records, open_records, override
from tests.training.runs import records


def test_parts_of_a_mixture_are_opened_and_looked_at_by_weight():
    rows = records(9)
    given = Mixture(
        MixtureComponent(rows[:5], 2.0),
        MixtureComponent((SequenceSource(rows[5:7]), rows[7:])),
    )
    found = open_records(given, "train")
    assert isinstance(found, pg.Mixture) and len(found) == 9
    assert [found[i].id for i in (0, 5, 8)] == ["r0", "r5", "r8"]
    assert [one.id for one in first_records(found, 6)] == ["r0", "r1", "r5", "r2", "r3", "r6"]
    assert [one.id for one in first_records(found.sources[0], 2)] == ["r0", "r1"]


def test_tuple_of_sources_is_joined():
    rows = records(4)
    found = open_records((SequenceSource(rows[:1]), SequenceSource(rows[1:])), "train")
    assert [found[i].id for i in range(4)] == ["r0", "r1", "r2", "r3"]
    assert len(open_records(tuple(rows), "train")) == 4


def test_mixture_on_the_command_line():
    text = "Mixture(MixtureComponent('a.jsonl', 3), "
    text += "MixtureComponent(Data('b', 'test'), transforms=(LowerCase(),)))"
    for before in (None, "x.jsonl", Data("x"), [{}]):
        config = TrainConfig(train=before).to_config()
        override(config, [f"train={text}"])
        mixture = TrainConfig.from_config(config).train
        assert [part.weight for part in mixture.components] == [3, 1.0]
        assert mixture.components[0].records == "a.jsonl"
        assert mixture.components[1].records == Data("b", "test")
        assert eval(repr(mixture), vars(pg.data) | {"Data": Data}) == mixture


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "There are no records: train is not set"),
        (MixtureComponent("x"), "train is a part of a mixture, without the mixture"),
        ((Mixture(MixtureComponent("x")), "y"), "train is a tuple with a mixture"),
        (
            Mixture(MixtureComponent((MixtureComponent("x"), "y"))),
            r"train.0. is a tuple with a",
        ),
        (
            Mixture(MixtureComponent([{}]), MixtureComponent(None)),
            r"no records: train\[1\] is not set",
        ),
    ],
)
def test_what_is_no_source(given: object, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        open_records(given, "train")
