"""Batches: their arrays, their order, any division of them, and resuming anywhere."""

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

from paligemma_jax.data.record import Record
from paligemma_jax.data.sources import SequenceSource
from paligemma_jax.errors import ConfigError, DatasetError
from paligemma_jax.processing.processor import Processor
from tests.data.conftest import Numbers, add_digit


def test_arrays_are_those_of_encode_train(make, processor: Processor):
    found = next(make(shuffle=False)).batch
    assert found.images.shape == (4, 1, 8, 8, 3) and found.images.dtype == np.float32
    for i in range(4):
        expected = processor.encode_train("caption en", f"{i}", 12)
        np.testing.assert_array_equal(found.tokens[i], expected["text"])
        np.testing.assert_array_equal(found.mask_ar[i], expected["mask_ar"])
        np.testing.assert_array_equal(found.mask_loss[i], expected["mask_loss"])
        np.testing.assert_array_equal(found.mask_input[i], expected["text"] != 0)
        np.testing.assert_allclose(found.images[i], i / 127.5 - 1, atol=1e-6)


def test_epochs_have_their_own_orders_and_every_record_once(make):
    ids = [name for batch in make(batch_size=5, epochs=3) for name in batch.ids]
    epochs = [ids[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == sorted(f"numbers:{i}" for i in range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert len(make(epochs=3)) == 7  # 30 records


def test_seed_decides_order_and_random_numbers(make):
    def first(seed: int):
        batch = next(make(seed=seed, transforms=[add_digit]))
        return batch.ids, batch.batch.tokens.tolist()

    assert first(1) == first(1)
    assert first(1)[0] != first(2)[0] and first(1)[1] != first(2)[1]


def test_any_division_among_processes_gives_the_same_batch(make):
    whole = next(make(transforms=[add_digit]))
    halves = [
        next(make(batch_size=2, process_index=i, process_count=2, transforms=[add_digit]))
        for i in range(2)
    ]
    assert halves[0].ids + halves[1].ids == whole.ids
    tokens = np.concatenate([half.batch.tokens for half in halves])
    np.testing.assert_array_equal(tokens, whole.batch.tokens)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_resuming_gives_the_batches_that_would_have_come(make, at: int):
    source, settings = Numbers(9, bad=(3,)), {"transforms": [add_digit], "max_bad_fraction": 0.01}
    batches = make(source, **settings)
    for _ in range(at):
        next(batches)
    state = batches.state()
    expected = [next(batches) for _ in range(4)]
    again = make(source, **settings)
    again.restore(state)
    assert again.position == at
    for wanted in expected:
        found = next(again)
        assert found.ids == wanted.ids
        np.testing.assert_array_equal(found.batch.tokens, wanted.batch.tokens)
    assert again.skipped == batches.skipped
    again.restore(state)  # of an iterator that has gone on
    assert next(again).ids == expected[0].ids


def test_state_is_small_and_can_be_taken_by_another_number_of_processes(make):
    batches = make()
    next(batches)
    state, expected = batches.state(), next(batches).ids
    values = json.loads(state)
    assert values["batch"] == 1 and values["seed"] == 1 and len(state) < 300
    half = make(batch_size=2, process_index=1, process_count=2)
    half.restore(state)
    assert next(half).ids == expected[2:]


def test_state_of_other_data_is_an_error(make):
    state = make().state()
    with pytest.raises(DatasetError, match="seed is 2, and was 1.*any number of workers"):
        make(seed=2).restore(state)
    with pytest.raises(DatasetError, match="data is.*records is 11, and was 10"):
        make(Numbers(11)).restore(state)
    with pytest.raises(DatasetError, match="global_batch_size is 5, and was 4"):
        make(batch_size=5).restore(state)
    with pytest.raises(DatasetError, match="damaged"):
        make().restore(state[:-5])


def test_bad_records_stop_or_are_skipped_counted_and_logged(make, caplog):
    source = Numbers(10, bad=(3, 7))
    with pytest.raises(DatasetError, match="numbers:[37]: it is damaged.*max_bad_fraction"):
        list(make(source, epochs=1))
    batches = make(source, epochs=2, batch_size=5, max_bad_fraction=0.2)
    ids = [name for batch in batches for name in batch.ids]
    assert len(ids) == 20 and not {"numbers:3", "numbers:7"} & set(ids)
    assert sorted(one.index for one in batches.skipped) == [3, 7]
    assert caplog.text.count("Skipped record") == 2 and "it is damaged" in caplog.text
    with pytest.raises(DatasetError, match="more than 10.0%.*max_bad_fraction=0.[46]"):
        list(make(source, epochs=1, max_bad_fraction=0.1))
    with pytest.raises(DatasetError, match="64 records one after another"):
        next(make(Numbers(200, bad=tuple(range(200))), max_bad_fraction=0.99))
    for fraction in (1.0, -0.1, 5, float("nan")):
        with pytest.raises(ConfigError, match="max_bad_fraction .* below 1"):
            make(source, max_bad_fraction=fraction)


def test_what_cannot_be_encoded_is_a_bad_record(make, caplog):
    examples = [{"image": np.zeros((4, 4, 3), np.uint8), "prefix": "caption en", "suffix": "a"}] * 4

    def with_last(**changes: Any) -> SequenceSource:
        return SequenceSource([*examples, examples[0] | changes])

    long = with_last(suffix="a long answer " * 9)
    with pytest.raises(DatasetError, match="record:4: .* tokens"):
        next(make(long, batch_size=5))
    assert next(make(long, batch_size=5, on_overflow="truncate")).batch.tokens.shape == (5, 13)
    assert "truncated to 12 tokens" in caplog.text
    with pytest.raises(DatasetError, match="record:4: .*nowhere.png"):
        next(make(with_last(image="nowhere.png"), batch_size=5))
    with pytest.raises(DatasetError, match="record:4: .*got 2.*RandomAnswer"):
        next(make(with_last(suffix=["a", "b"]), batch_size=5))
    record = dataclasses.replace(Numbers(4)[0], size=(4, 6))
    with pytest.raises(DatasetError, match="4 x 6 pixels.* got 6 x 4"):
        next(make(SequenceSource([record] * 4)))


def test_number_of_images(make):
    image = np.zeros((4, 4, 3), np.uint8)
    two, one = (Record((image,) * n, "p", "s", f"with {n}") for n in (2, 1))
    assert next(make([two] * 4)).batch.images.shape == (4, 2, 8, 8, 3)
    assert next(make([dataclasses.replace(one, images=())] * 4)).batch.images is None
    with pytest.raises(DatasetError, match=r"got 2 \(with 2\) and 1 \(with 1\)"):
        next(make([two, one] * 2, shuffle=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be .* from 1 up, got 0"),
        ({"seed": -1}, "seed .*got -1"),
        ({"length": 1.5}, "length .*got 1.5"),
        ({"epochs": 0}, "epochs .*got 0"),
        ({"process_index": 2, "process_count": 2}, "process_index .* 0 to 1, got 2"),
    ],
)
def test_numbers_out_of_range(make, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_fewer_records_than_a_batch(make):
    with pytest.raises(DatasetError, match="at least 11 records.* got 10.* at most 10"):
        make(batch_size=11)


@pytest.mark.slow
def test_workers_change_nothing_and_pass_errors_on(make):
    source = Numbers(11, bad=(3,))
    settings = {"transforms": [add_digit], "epochs": 3, "max_bad_fraction": 0.01}
    expected = list(make(source, **settings))
    with make(source, workers=2, **settings) as spread:
        first = [next(spread) for _ in range(3)]
        state = spread.state()
    again = make(source, workers=1, **settings)
    again.restore(state)
    found = first + list(again)
    for one, other in zip(found, expected, strict=True):
        assert one.ids == other.ids
        np.testing.assert_array_equal(one.batch.tokens, other.batch.tokens)
        np.testing.assert_array_equal(one.batch.images, other.batch.images)
    with pytest.raises(DatasetError, match="it is damaged"):
        list(make(source, epochs=1, workers=1))


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
        from tests.data.conftest import MODEL, Numbers

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

    assert "A worker process that reads data was killed" in run("worker")
    worker = Path(f"/proc/{int(run('trainer'))}/stat")
    for _ in range(100):
        # Ended; or only its exit status is left, for whoever is to collect it.
        if not worker.exists() or worker.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")
