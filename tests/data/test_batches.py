"""Batches: their arrays, their order, any division of them, and going on where one was."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma_jax.data.batches import Batches, make_batches
from paligemma_jax.data.record import Record
from paligemma_jax.data.sources import SequenceSource
from paligemma_jax.errors import ConfigError, DatasetError
from paligemma_jax.processing.processor import Processor, Truncate
from tests.data.records import Numbers, add_chance, all_ids

pytest.importorskip("grain", reason='needs the extra "data"')


@pytest.fixture(name="make")
def _make(processor: Processor, request: pytest.FixtureRequest):
    def make(source: Any = None, **changes: Any) -> Batches:
        settings: dict[str, Any] = {"batch_size": 4, "length": 12, "seed": 1, **changes}
        source = Numbers(10) if source is None else source
        batches = make_batches(source, processor, **settings)
        request.addfinalizer(batches.close)
        return batches

    return make


def test_arrays_are_those_of_encode_train(make, processor: Processor):
    found = next(make(shuffle=False)).batch
    assert found.images.shape == (4, 1, 8, 8, 3) and found.images.dtype == np.float32
    for place in range(4):
        expected = processor.encode_train("caption en", f"{place}", 12)
        np.testing.assert_array_equal(found.tokens[place], expected["text"])
        np.testing.assert_array_equal(found.mask_ar[place], expected["mask_ar"])
        np.testing.assert_array_equal(found.mask_loss[place], expected["mask_loss"])
        np.testing.assert_array_equal(found.mask_input[place], expected["text"] != 0)
        np.testing.assert_allclose(found.images[place], place / 127.5 - 1, atol=1e-6)


def test_epochs_have_their_own_orders_and_leave_nothing_out(make):
    ids = [name for batch in make(batch_size=5, epochs=3) for name in batch.ids]
    epochs = [ids[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == sorted(f"numbers:{i}" for i in range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert len(make(epochs=3)) == 7  # 30 records


def test_seed_decides_order_and_chance(make):
    def first(seed: int):
        batch = next(make(seed=seed, transforms=[add_chance]))
        return batch.ids, batch.batch.tokens.tolist()

    assert first(1) == first(1)
    assert first(1)[0] != first(2)[0] and first(1)[1] != first(2)[1]


def test_any_division_among_processes_gives_the_same_batch(make):
    whole = next(make(transforms=[add_chance]))
    halves = [
        next(make(batch_size=2, process_index=i, process_count=2, transforms=[add_chance]))
        for i in range(2)
    ]
    assert halves[0].ids + halves[1].ids == whole.ids
    tokens = np.concatenate([half.batch.tokens for half in halves])
    np.testing.assert_array_equal(tokens, whole.batch.tokens)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_going_on_gives_the_batches_that_would_have_come(make, at: int):
    batches = make(Numbers(9, bad=(3,)), transforms=[add_chance], max_bad_records=0.01)
    for _ in range(at):
        next(batches)
    state = batches.state()
    expected = [next(batches) for _ in range(4)]
    again = make(Numbers(9, bad=(3,)), transforms=[add_chance], max_bad_records=0.01)
    again.restore(state)
    assert again.position == at
    for wanted in expected:
        found = next(again)
        assert found.ids == wanted.ids
        np.testing.assert_array_equal(found.batch.tokens, wanted.batch.tokens)
    assert again.skipped == batches.skipped
    again.restore(state)  # of an iterator that has gone on
    assert next(again).ids == expected[0].ids


def test_state_can_be_taken_by_another_number_of_processes(make):
    batches = make()
    next(batches)
    state, expected = batches.state(), next(batches).ids
    half = make(batch_size=2, process_index=1, process_count=2)
    half.restore(state)
    assert next(half).ids == expected[2:]


def test_state_of_other_data_is_refused(make):
    state = make().state()
    with pytest.raises(DatasetError, match="seed is 2, and was 1.*any number of workers"):
        make(seed=2).restore(state)
    with pytest.raises(DatasetError, match="data is.*records is 11, and was 10"):
        make(Numbers(11)).restore(state)
    with pytest.raises(DatasetError, match="rows of a batch is 5, and was 4"):
        make(batch_size=5).restore(state)
    with pytest.raises(DatasetError, match="damaged"):
        make().restore(state[:-5])


def test_a_bad_record_stops_unless_told_otherwise(make):
    source = Numbers(10, bad=(3, 7))
    with pytest.raises(DatasetError, match="numbers:[37]: it is damaged.*max_bad_records"):
        list(make(source, epochs=1))


def test_bad_records_are_skipped_counted_and_logged(make, caplog: pytest.LogCaptureFixture):
    source = Numbers(10, bad=(3, 7))
    batches = make(source, epochs=2, batch_size=5, max_bad_records=0.2)
    ids = [name for batch in batches for name in batch.ids]
    assert len(ids) == 20 and not {"numbers:3", "numbers:7"} & set(ids)
    assert sorted(skip.number for skip in batches.skipped) == [3, 7]
    assert caplog.text.count("Left out record") == 2 and "it is damaged" in caplog.text


def test_too_many_bad_records_stop(make):
    with pytest.raises(DatasetError, match="more than 10.0%.*max_bad_records=0.[46]"):
        list(make(Numbers(10, bad=(3, 7)), epochs=1, max_bad_records=0.1))
    with pytest.raises(DatasetError, match="64 records one after another"):
        next(make(Numbers(10, bad=tuple(range(10))), max_bad_records=1.0))


def test_what_cannot_be_encoded_is_a_bad_record(make):
    rows = [{"image": np.zeros((4, 4, 3), np.uint8), "prefix": "caption en", "suffix": "a"}] * 4
    long = SequenceSource([*rows, rows[0] | {"suffix": "a long answer " * 9}])
    with pytest.raises(DatasetError, match="record:4: The text has .* tokens"):
        next(make(long, batch_size=5))
    cut = make(long, batch_size=5, on_overflow=Truncate())
    assert next(cut).batch.tokens.shape == (5, 13) and cut.cut == 1
    missing = SequenceSource([*rows, rows[0] | {"image": "nowhere.png"}])
    with pytest.raises(DatasetError, match="record:4: The picture nowhere.png does not exist"):
        next(make(missing, batch_size=5))
    several = SequenceSource([rows[0] | {"suffix": ["a", "b"]}] * 4)
    with pytest.raises(DatasetError, match="record:0 has 2 answers.*RandomAnswer"):
        next(make(several, shuffle=False))


def test_pictures_of_another_size_than_their_boxes_are_bad(make):
    record = dataclasses.replace(Numbers(4)[0], size=(4, 6))
    with pytest.raises(DatasetError, match="6 x 4 pixels, and the data says 4 x 6"):
        next(make(SequenceSource([record] * 4)))


def test_number_of_pictures(make):
    picture = np.zeros((4, 4, 3), np.uint8)
    two, one = (Record((picture,) * n, "p", "s", f"with {n}") for n in (2, 1))
    assert next(make([two] * 4)).batch.images.shape == (4, 2, 8, 8, 3)
    assert next(make([dataclasses.replace(one, images=())] * 4)).batch.images is None
    with pytest.raises(DatasetError, match="with 2 has 2, with 1 has 1"):
        next(make([two, one] * 2, shuffle=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"length": 1.5}, "length is 1.5"),
        ({"epochs": 0}, "epochs is 0"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2. 0 to 1"),
    ],
)
def test_numbers_that_do_not_fit(make, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_fewer_records_than_a_batch(make):
    with pytest.raises(DatasetError, match="10 records do not fill a batch of 11"):
        make(batch_size=11)


def test_state_is_small_and_readable(make):
    batches = make()
    next(batches)
    values = json.loads(batches.state())
    assert values["batch"] == 1 and values["seed"] == 1 and len(batches.state()) < 300


@pytest.mark.slow
def test_workers_change_nothing(make):
    plain = make(Numbers(11, bad=(3,)), transforms=[add_chance], epochs=3,
                 max_bad_records=0.01)  # fmt: skip
    with make(Numbers(11, bad=(3,)), transforms=[add_chance], epochs=3, workers=2,
              max_bad_records=0.01) as spread:  # fmt: skip
        first = [next(spread) for _ in range(3)]
        state = spread.state()
        assert spread.skipped or state
    expected = list(plain)
    again = make(Numbers(11, bad=(3,)), transforms=[add_chance], epochs=3, workers=1,
                 max_bad_records=0.01)  # fmt: skip
    again.restore(state)
    found = first + list(again)
    assert all_ids(found) == all_ids(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.batch.tokens, other.batch.tokens)
        np.testing.assert_array_equal(one.batch.images, other.batch.images)


@pytest.mark.slow
def test_errors_come_out_of_workers(make):
    with pytest.raises(DatasetError, match="it is damaged"):
        list(make(Numbers(10, bad=(3,)), epochs=1, workers=1))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_worker_stops_and_a_killed_trainer_leaves_none(tmp_path: Path):
    program = """
        import multiprocessing, os, signal, sys, time
        from paligemma_jax.data import make_batches
        from paligemma_jax.errors import DatasetError
        from paligemma_jax.processing.image import ImagePreprocessing
        from paligemma_jax.processing.processor import Processor
        from paligemma_jax.processing.tokenizer import Tokenizer
        from tests.data.conftest import MODEL
        from tests.data.records import Numbers

        if __name__ == "__main__":
            processor = Processor(Tokenizer.from_file(MODEL), ImagePreprocessing(size=8))
            batches = make_batches(
                Numbers(64), processor, batch_size=4, length=12, seed=0, workers=1
            )
            next(batches)
            (worker,) = multiprocessing.active_children()
            if sys.argv[1] == "trainer":
                print(worker.pid, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(worker.pid, signal.SIGKILL)
            try:
                for _ in range(50):
                    next(batches)
            except DatasetError as e:
                print(e)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(program))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def run(victim: str) -> str:
        command = [sys.executable, str(script), victim]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        return result.stdout

    assert "A process that reads data has ended from outside" in run("worker")
    worker = Path(f"/proc/{int(run('trainer'))}/stat")
    for _ in range(100):
        # Ended; or only its exit status is left, for whoever is to collect it.
        if not worker.exists() or worker.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")
