"""Mixtures: shares, parts gone through by themselves, processes, and going on anywhere."""

import collections
import dataclasses
import itertools
import pickle
from typing import Any

import numpy as np
import pytest

import paligemma_jax as pg
from paligemma_jax.data.batches import (
    Batches,
    Mixture,
    MixtureComponent,
    interleave,
    make_batches,
)
from paligemma_jax.data.check import check_data
from paligemma_jax.data.sources import SequenceSource
from paligemma_jax.errors import ConfigError, DatasetError
from paligemma_jax.processing.processor import Processor
from tests.data.records import Numbers, add_chance

pytest.importorskip("grain", reason='needs the extra "data"')


@dataclasses.dataclass(frozen=True)
class Named:
    """Records of a name: Numbers with other ids."""

    name: str
    count: int
    bad: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> pg.data.Record:
        record = Numbers(self.count, self.bad)[index]
        return dataclasses.replace(record, id=f"{self.name}:{index}")


def say_epoch(record: pg.data.Record, rng: np.random.Generator) -> pg.data.Record:
    """The id tells in which epoch the record came."""
    return dataclasses.replace(record, id=f"{record.id} {record.epoch}")


MIXED = Mixture(MixtureComponent(Named("a", 5), 3.0), MixtureComponent(Named("b", 7), 1.0))


@pytest.fixture(name="make")
def _make(processor: Processor, request: pytest.FixtureRequest):
    def make(source: Any = MIXED, **changes: Any) -> Batches:
        settings: dict[str, Any] = {"batch_size": 4, "length": 12, "seed": 1, **changes}
        batches = make_batches(source, processor, **settings)
        request.addfinalizer(batches.close)
        return batches

    return make


def ids(batches: Batches, count: int) -> list[str]:
    return [name for batch in itertools.islice(batches, count) for name in batch.ids]


@pytest.mark.parametrize(
    "shares", [(1,), (3, 1), (1, 1, 1), (1, 10, 7, 390, 13), (200, 99, 1), (7, 8, 78, 1), (1,) * 9]
)
def test_no_part_is_ever_a_record_off_its_share(shares: tuple[int, ...]):
    total = sum(shares)
    had = [0] * len(shares)
    for place, (part, before) in enumerate(interleave(shares), 1):
        assert before == had[part]
        had[part] += 1
        # In whole numbers: |had - place * share / total| < 1.
        off = [abs(count * total - place * s) for count, s in zip(had, shares, strict=True)]
        assert max(off) < total
    assert tuple(had) == shares  # a round ends even, so this holds for ever


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((3.0, 1.0), (3, 1)),
        ((0.7, 0.2, 0.1), (7, 2, 1)),
        ((np.float32(0.5), 1), (1, 2)),
        ((1e-3, 1), (1, 1000)),
        ((200_000, 100_000), (2, 1)),
    ],
)
def test_weights_are_taken_as_they_are_written(weights: tuple[float, ...], shares: Any):
    assert Mixture(*(MixtureComponent([], weight) for weight in weights)).shares == shares


def test_weights_without_small_shares_are_rounded_to_65536ths():
    weights = (1 / 3, 2 / 7, 123457.0 / 1e6)
    shares = Mixture(*(MixtureComponent([], weight) for weight in weights)).shares
    assert sum(shares) <= 65536
    np.testing.assert_allclose(
        np.array(shares) / sum(shares), np.array(weights) / sum(weights), atol=1 / 65536
    )


def test_each_part_is_gone_through_by_itself_each_epoch_in_its_own_order(make):
    found = ids(make(transforms=[say_epoch]), 35)  # 105 of a, 35 of b
    for name, size in (("a", 5), ("b", 7)):
        own = [one for one in found if one.startswith(name)]
        assert len(own) == {"a": 105, "b": 35}[name]
        epochs = [own[start : start + size] for start in range(0, len(own), size)]
        for epoch, records in enumerate(epochs):
            assert sorted(records) == [f"{name}:{i} {epoch}" for i in range(size)]
        assert len({tuple(one.split()[0] for one in records) for records in epochs}) > 2
    assert len(make(epochs=2)) == 24 // 4  # an epoch is of 12 records
    assert ids(make(), 9) == ids(make(), 9) != ids(make(seed=2), 9)


def test_one_source_in_two_parts_comes_in_two_orders(make):
    twice = Mixture(
        *(MixtureComponent(Named("x", 50), transforms=(one,)) for one in (say_epoch, add_chance))
    )
    found = ids(make(twice), 25)
    first = [one.split()[0] for one in found if one.endswith(" 0")]
    assert sorted(first) == sorted(one for one in found if not one.endswith(" 0"))
    assert first != [one for one in found if not one.endswith(" 0")]


def test_two_processes_have_the_two_halves_of_each_batch(make):
    whole = ids(make(), 10)
    halves = [ids(make(batch_size=2, process_index=i, process_count=2), 10) for i in (0, 1)]
    for start in range(0, 40, 4):
        both = halves[0][start // 2 : start // 2 + 2] + halves[1][start // 2 : start // 2 + 2]
        assert both == whole[start : start + 4]
    # While no part comes round, no record is in both.
    large = Mixture(MixtureComponent(Named("a", 99), 2), MixtureComponent(Named("b", 99), 1))
    left, right = (
        set(ids(make(large, batch_size=2, process_index=i, process_count=2), 30)) for i in (0, 1)
    )
    assert len(left) == len(right) == 60 and not left & right


@pytest.mark.parametrize("at", [1, 6, 17])
def test_going_on_anywhere_gives_the_batches_that_would_have_come(make, at: int):
    bad = Mixture(
        MixtureComponent(Named("a", 5, bad=(3,)), 2),
        MixtureComponent(Named("b", 7), 1, (add_chance, say_epoch)),
    )
    batches = make(bad, max_bad_records=0.2, batch_size=3)
    for _ in range(at):
        next(batches)
    state = batches.state()
    expected = [next(batches) for _ in range(4)]
    again = make(pickle.loads(pickle.dumps(bad)), max_bad_records=0.2, batch_size=3)
    again.restore(state)
    for wanted in expected:
        found = next(again)
        assert found.ids == wanted.ids and "a:3" not in found.ids
        np.testing.assert_array_equal(found.batch.tokens, wanted.batch.tokens)
        assert sum(name.startswith("a") for name in found.ids) == 2  # its own take its place


def test_place_in_other_shares_is_refused(make):
    state = make().state()
    same = Mixture(MixtureComponent(Named("a", 5), 6.0), MixtureComponent(Named("b", 7), 2.0))
    make(same).restore(state)
    with pytest.raises(DatasetError, match="data is"):
        make(
            Mixture(MixtureComponent(Named("a", 5), 2.0), MixtureComponent(Named("b", 7)))
        ).restore(state)


@pytest.mark.slow
def test_workers_change_nothing(make):
    expected = ids(make(transforms=[add_chance]), 12)
    with make(transforms=[add_chance], workers=2) as spread:
        found = ids(spread, 5)
        state = spread.state()
    again = make(transforms=[add_chance], workers=1)
    again.restore(state)
    assert found + ids(again, 7) == expected


def test_check_reports_each_part(processor: Processor):
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    row = {"image": picture, "prefix": "caption en", "suffix": "a cat"}
    captions = SequenceSource([row, row | {"suffix": ""}], name="captions")
    questions = SequenceSource([row | {"suffix": "yes" + " yes" * 30}], name="questions")
    drawn = collections.Counter()

    def count(record: pg.data.Record, rng: np.random.Generator) -> pg.data.Record:
        drawn[record.id] += 1
        return record

    mixed = Mixture(
        MixtureComponent(captions, 3), MixtureComponent(questions, 1, transforms=(count,))
    )
    report = check_data(mixed, processor, 16)
    kinds = [[problem.kind.name for problem in split.problems] for split in report.splits]
    assert kinds == [["EMPTY"], ["LONG"]]  # and no picture is called shared between splits
    assert drawn["questions:0"] and set(drawn) == {"questions:0"}
    text = str(report)
    assert (
        "part 0, 75.0% of what is drawn, each record 1.12 times an epoch: SequenceSource(" in text
    )
    assert (
        "part 1, 25.0% of what is drawn, each record 0.75 times an epoch: SequenceSource(" in text
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Mixture(), "has no parts.*Mixture\\(MixtureComponent"),
        (lambda: MixtureComponent("x", 0), "weight of a part is 0. A positive"),
        (lambda: MixtureComponent("x", float("nan")), "weight of a part is nan"),
        (lambda: MixtureComponent("x", "3"), "weight of a part is '3'"),  # pyright: ignore[reportArgumentType]
        (lambda: MixtureComponent("x", True), "weight of a part is True"),
        (lambda: MixtureComponent(MIXED), "holds a Mixture.*all parts into one"),
        (lambda: MixtureComponent(MixtureComponent("x")), "holds a MixtureComponent"),
        (lambda: Mixture(("x", 3.0)), "Component 0 of the mixture is a tuple"),  # pyright: ignore
        (lambda: MixtureComponent("x", 1, add_chance), "transforms of a part are"),  # pyright: ignore
        (
            lambda: Mixture(MixtureComponent("x", 1e9), MixtureComponent("y")),
            "Component 1 .* weight 1.0, less than a record",
        ),
    ],
)
def test_what_is_no_mixture_is_one_message(wrong: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        wrong()


def test_parts_that_are_not_opened(make):
    for records in ("train.jsonl", [], [{"image": "x.png"}], None):
        with pytest.raises(
            DatasetError, match="Component 1 of the mixture, .*is no source of records"
        ):
            make(Mixture(MixtureComponent(Named("a", 5)), MixtureComponent(records)))
