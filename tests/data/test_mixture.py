"""Mixtures: fractions, components repeated on their own, processes, and resuming anywhere."""

import collections
import dataclasses
import itertools
import pickle
from typing import Any

import numpy as np
import pytest

from paligemma_jax.data.batches import Batches
from paligemma_jax.data.check import check_data
from paligemma_jax.data.mixture import Mixture, MixtureComponent, Sampler
from paligemma_jax.data.record import Record
from paligemma_jax.data.sources import SequenceSource
from paligemma_jax.errors import ConfigError, DatasetError
from paligemma_jax.processing.processor import Processor
from tests.data.conftest import Numbers, add_digit

pytest.importorskip("grain", reason='needs the extra "data"')
A, B = Numbers(5, name="a"), Numbers(7, name="b")


def mix(*weighted: tuple[Any, float]) -> Mixture:
    return Mixture(*(MixtureComponent(records, weight) for records, weight in weighted))


MIXED = mix((A, 3.0), (B, 1.0))


def add_epoch(record: Record, rng: np.random.Generator) -> Record:
    """The id tells in which epoch the record came."""
    return dataclasses.replace(record, id=f"{record.id} {record.epoch}")


def ids(batches: Batches, count: int) -> list[str]:
    return [name for batch in itertools.islice(batches, count) for name in batch.ids]


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1, 10, 7, 390, 13), (0.7, 0.2, 0.1), (1 / 3, 1)])
def test_weights_are_followed_to_one_percent(weights: tuple[float, ...]):
    sampler = Sampler((9,) * len(weights), weights, seed=0, shuffle=False)
    counts = collections.Counter(sampler[i].component for i in range(2000))
    expected = [2000 * weight / sum(weights) for weight in weights]
    for component, count in enumerate(expected):
        assert abs(counts[component] - count) < 1.5 + 0.01 * count


def test_each_component_is_repeated_on_its_own_each_epoch_in_its_own_order(make):
    found = ids(make(MIXED, transforms=[add_epoch]), 35)  # 105 of a, 35 of b
    for name, size in (("a", 5), ("b", 7)):
        own = [one for one in found if one.startswith(name)]
        assert len(own) == {"a": 105, "b": 35}[name]
        epochs = [own[start : start + size] for start in range(0, len(own), size)]
        for epoch, records in enumerate(epochs):
            assert sorted(records) == [f"{name}:{i} {epoch}" for i in range(size)]
        assert len({tuple(one.split()[0] for one in records) for records in epochs}) > 2
    assert len(make(MIXED, epochs=2)) == 24 // 4  # an epoch is of 12 records
    assert ids(make(MIXED), 9) == ids(make(MIXED), 9) != ids(make(MIXED, seed=2), 9)


def test_one_source_in_two_components_has_two_orders_and_transforms(make):
    source = Numbers(50)
    twice = Mixture(*(MixtureComponent(source, transforms=(t,)) for t in (add_epoch, add_digit)))
    found = ids(make(twice), 25)
    first = [one.split()[0] for one in found if one.endswith(" 0")]
    second = [one for one in found if not one.endswith(" 0")]
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("at", [1, 6, 17])
def test_resuming_anywhere_gives_the_batches_that_would_have_come(make, at: int):
    bad = Mixture(
        MixtureComponent(Numbers(5, (3,), "a"), 2),
        MixtureComponent(B, 1, (add_digit, add_epoch)),
    )
    batches = make(bad, max_bad_fraction=0.2, batch_size=3)
    for _ in range(at):
        next(batches)
    state = batches.state()
    expected = [next(batches) for _ in range(4)]
    again = make(pickle.loads(pickle.dumps(bad)), max_bad_fraction=0.2, batch_size=3)
    again.restore(state)
    third = make(bad, max_bad_fraction=0.2, batch_size=1, process_index=2, process_count=3)
    third.restore(state)
    assert next(third).ids == expected[0].ids[2:]
    for wanted in expected:
        found = next(again)
        assert found.ids == wanted.ids and "a:3" not in found.ids
        np.testing.assert_array_equal(found.batch.tokens, wanted.batch.tokens)
        assert sum(name.startswith("a") for name in found.ids) == 2  # replaced by its own


def test_state_of_other_weights_is_an_error(make):
    state = make(MIXED).state()
    make(mix((A, 6.0), (B, 2.0))).restore(state)
    with pytest.raises(DatasetError, match="data is"):
        make(mix((A, 2.0), (B, 1.0))).restore(state)


def test_check_reports_each_component(processor: Processor):
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    example = {"image": image, "prefix": "caption en", "suffix": "a cat"}
    captions = SequenceSource([example, example | {"suffix": ""}], name="captions")
    questions = SequenceSource([example | {"suffix": "yes" + " yes" * 30}], name="questions")
    changed = collections.Counter()

    def count(record: Record, rng: np.random.Generator) -> Record:
        changed[record.id] += 1
        return record

    mixed = Mixture(MixtureComponent(captions, 3), MixtureComponent(questions, 1, (count,)))
    report = check_data(mixed, processor, 16)
    kinds = [[problem.kind.name for problem in split.problems] for split in report.splits]
    assert kinds == [["EMPTY"], ["TOO_LONG"]]  # and no image is called shared between splits
    assert changed["questions:0"] and set(changed) == {"questions:0"}
    assert "component 0, 75.0% of the samples, each record 1.12 times an epoch: " in str(report)
    assert "component 1, 25.0% of the samples, each record 0.75 times an epoch: " in str(report)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Mixture(), "got no components"),
        (lambda: MixtureComponent("x", 0), "positive, finite number, got 0"),
        (lambda: MixtureComponent("x", float("nan")), "got nan"),
        (lambda: MixtureComponent("x", "3"), "got '3'"),  # pyright: ignore[reportArgumentType]
        (lambda: MixtureComponent("x", True), "got True"),
        (lambda: MixtureComponent(MIXED), "got Mixture.*one mixture"),
        (lambda: MixtureComponent(MixtureComponent("x")), "got MixtureComponent"),
        (lambda: Mixture(("x", 3.0)), "got a tuple"),  # pyright: ignore[reportArgumentType]
        (lambda: MixtureComponent("x", 1, add_digit), "must be a tuple"),  # pyright: ignore
    ],
)
def test_what_is_not_a_mixture_is_one_message(wrong: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        wrong()


@pytest.mark.parametrize("records", ["train.jsonl", [], [{"image": "x.png"}], None])
def test_components_that_are_not_opened(make, records: Any):
    with pytest.raises(DatasetError, match="Component 1 of the mixture must be a source"):
        make(mix((A, 1.0), (records, 1.0)))
