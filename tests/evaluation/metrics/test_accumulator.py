"""Adding, merging, leaving out, and what is said of data that does not fit."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from paligemma_jax.errors import ConfigError, DatasetError
from paligemma_jax.evaluation import metrics, tasks
from paligemma_jax.evaluation.answer_metrics import ExactMatch, VQAv2Accuracy, exact_match
from paligemma_jax.evaluation.metric import ByGroup, Grouped, Together, by_id


def test_metrics_load_neither_jax_nor_pillow():
    program = (
        "import sys, paligemma_jax.evaluation.metrics as m; m.exact_match(['a'], ['a']); "
        "print(sorted({n.partition('.')[0] for n in sys.modules} & {'jax', 'flax', 'PIL'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_lists_and_mappings():
    assert exact_match(["a", "b"], ["a", "c"]) == {"acc": 0.5, "num": 2, "left_out": 0}
    assert exact_match({"x": "a", "y": "b"}, {"y": ["c", "b"], "x": "a"})["acc"] == 1


def examples(count: int = 40):
    rng = np.random.default_rng(0)
    words = ["a red car", "two cats", "a dog on a mat", "one bird", "no", "yes"]
    return [
        (
            i,
            words[rng.integers(len(words))],
            [words[j] for j in rng.integers(len(words), size=3)],
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExactMatch(lower=True),
        lambda: Together(metrics.CIDEr(), metrics.BLEU(), metrics.RougeL(), metrics.Meteor()),
        lambda: metrics.SimpleVQAAccuracy(),
    ],
)
def test_processes_and_order_change_nothing(make):
    whole, first, second = make(), make(), make()
    for i, prediction, reference in examples():
        whole.add(i, prediction, reference)
    for i, prediction, reference in reversed(examples()):
        (first if i % 3 else second).add(i, prediction, reference)
    first.merge(pickle.loads(pickle.dumps(second)))
    assert first.result() == whole.result()
    assert first.scores == whole.scores
    assert first.ids == list(range(40))


def test_merge_refuses_common_ids_and_other_metrics():
    first, second = ExactMatch(), ExactMatch()
    first.add(1, "a", "a")
    second.add(1, "a", "a")
    second.leave_out(2, "no picture")
    with pytest.raises(DatasetError, match="1 has been added before"):
        first.merge(second)
    with pytest.raises(DatasetError, match="lower"):
        first.merge(ExactMatch(lower=True))
    with pytest.raises(DatasetError, match="cannot be added"):
        ByGroup(ExactMatch()).merge(ByGroup(ExactMatch(lower=True)))  # type: ignore[arg-type]


def test_left_out_are_counted_and_named():
    metric = ExactMatch()
    metric.add("a", "x", "x")
    metric.leave_out("b", "picture b.png cannot be read")
    assert metric.result() == {"acc": 1, "num": 1, "left_out": 1}
    assert metric.left_out == {"b": "picture b.png cannot be read"}
    with pytest.raises(DatasetError, match="'b' has been added before"):
        metric.add("b", "x", "x")


def test_without_examples():
    metric = ExactMatch()
    metric.leave_out(1, "lost")
    with pytest.raises(DatasetError, match=r"no examples \(1 were left out\)"):
        metric.result()
    with pytest.raises(DatasetError, match="no examples"):
        exact_match([], [])


def test_every_problem_is_listed_and_nothing_added():
    metric = VQAv2Accuracy()
    predictions = {"a": "x", "b": None, "c": 3, "d": "x", "e": "", "f": "x", "g": "x"}
    ten = ["x"] * 10
    references = {"a": ten, "b": ten, "c": ten, "d": ten[:9], "e": ten, "f": [], "g": [*ten[:9], 1]}
    with pytest.raises(DatasetError) as e:
        metric.add_all(predictions, references)
    message = str(e.value)
    assert "(5 problems)" in message
    for line in (
        "'b': the prediction is missing",
        "'c': the prediction is 3 of type int, no string",
        "'d': there are 9 answers, not 10",
        "'f': there are no answers",
        "'g': 1 of the answers are no strings but int: 1",
        "10 answers (a list of strings) fit.",
    ):
        assert line in message
    assert metric.ids == []
    assert VQAv2Accuracy().add_all({"e": ""}, {"e": ten}).result()["acc"] == 0


@pytest.mark.parametrize(
    ("predictions", "references", "said"),
    [
        (
            {"a": "", "b": "", "c": ""},
            {"a": "", "d": "", "e": ""},
            [
                "'d' has a reference, but no prediction",
                "'e' has a reference, but no prediction",
                "'b' has a prediction, but no reference",
                "'c' has a prediction, but no reference",
            ],
        ),
        (["a"], ["a", "b"], ["1 predictions and 2 references"]),
        ({"a": "a"}, ["a"], ["predictions are of type dict and references of type list"]),
        ("ab", "ab", ["predictions are of type str"]),
        (["a"], [{"a"}], ["the answer is {'a'} of type set, no string"]),
    ],
)
def test_what_cannot_be_paired(predictions, references, said):
    with pytest.raises(DatasetError) as e:
        exact_match(predictions, references)
    for line in said:
        assert line in str(e.value)


def test_a_string_is_no_list_of_answers():
    with pytest.raises(DatasetError, match="no list"):
        metrics.anls(["a"], ["abc"])


def test_many_problems_are_counted():
    with pytest.raises(DatasetError, match="and 50 more"):
        exact_match([None] * 150, ["a"] * 150)  # type: ignore[list-item]


def test_ids_come_once():
    assert by_id([("a", 1), ("b", 2)]) == {"a": 1, "b": 2}
    with pytest.raises(DatasetError, match="'a' comes 3 times\n  'c' comes 2 times"):
        by_id([("a", 1), ("c", 1), ("b", 2), ("a", 3), ("c", 1), ("a", 4)])
    metric = ExactMatch()
    metric.add("a", "x", "x")
    with pytest.raises(DatasetError, match="'a' has been added before"):
        metric.add("a", "x", "x")


def test_groups_and_averages():
    metric = ByGroup(ExactMatch(), {"mean": None, "some": ("a", "b"), "others": ("a", "z")})
    rows = [("a", "x"), ("a", "y"), ("a", "x"), ("a", "x"), ("b", "x"), ("c", "y")]
    for i, (group, prediction) in enumerate(rows):
        metric.add(i, prediction, Grouped(group, "x"))
    result = metric.result()
    assert result["acc"] == pytest.approx(4 / 6)
    assert (result["acc/a"], result["acc/b"], result["acc/c"]) == (0.75, 1, 0)
    assert result["acc/mean"] == pytest.approx(1.75 / 3)
    assert result["acc/some"] == pytest.approx(1.75 / 2)
    assert "acc/others" not in result  # a group is not there
    assert (result["num/a"], result["num"]) == (4, 6)
    assert metric.scores[1] == 0
    with pytest.raises(DatasetError, match="not Grouped"):
        metric.add(9, "x", "x")
    filled = ExactMatch()
    filled.add(1, "a", "a")
    with pytest.raises(ConfigError, match="1 examples already"):
        ByGroup(filled)


def test_every_task_has_a_metric_and_a_figure():
    for task in tasks.TASKS:
        assert tasks.metric_for(task).ids == []
    with pytest.raises(ConfigError, match="no task 'vqa'"):
        tasks.metric_for("vqa")
