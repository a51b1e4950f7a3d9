"""Adding, merging, skipping, groups, confidence intervals, and errors that list every problem."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from paligemma_jax.errors import ConfigError, DatasetError
from paligemma_jax.evaluation import metric as metric_module
from paligemma_jax.evaluation import metrics
from paligemma_jax.evaluation.metrics import (
    ExactMatch,
    PairAnswer,
    PairedAccuracy,
    TextRecognition,
    VQAv2Accuracy,
    bootstrap,
    exact_match,
)


def test_metrics_load_neither_jax_nor_pillow():
    program = (
        "import sys, paligemma_jax.evaluation.metrics as m; m.exact_match(['a'], ['a']); "
        "print(sorted({n.partition('.')[0] for n in sys.modules} & {'jax', 'flax', 'PIL'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_lists_and_mappings():
    assert exact_match(["a", "b"], ["a", "c"]) == {"acc": 0.5, "num": 2, "skipped": 0}
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
        metrics.CaptionScores,
        metrics.SimpleVQAAccuracy,
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
    assert first.example_scores == whole.example_scores
    assert first.ids == list(range(40))


def test_merge_refuses_common_ids_and_other_metrics():
    first, second = ExactMatch(), ExactMatch()
    first.add(1, "a", "a")
    second.add(1, "a", "a")
    second.skip(2, "no image")
    with pytest.raises(DatasetError, match="1 has been added before"):
        first.merge(second)
    for other in (ExactMatch(lower=True), ExactMatch(averages={"mean": None}), VQAv2Accuracy()):
        with pytest.raises(DatasetError, match="cannot be merged"):
            first.merge(other)  # type: ignore[arg-type]


def test_skipped_are_counted_and_named():
    metric = ExactMatch()
    metric.add("a", "x", "x")
    metric.skip("b", "b.png cannot be read")
    assert metric.result() == {"acc": 1, "num": 1, "skipped": 1}
    assert metric.skipped == {"b": "b.png cannot be read"}
    with pytest.raises(DatasetError, match="'b' has been added before"):
        metric.add("b", "x", "x")


def test_without_examples():
    metric = ExactMatch()
    metric.skip(1, "lost")
    with pytest.raises(DatasetError, match=r"no examples \(1 were skipped\)"):
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
        "'c': expected the prediction to be a string, got 3 (int)",
        "'d': expected 10 answers, got 9",
        "'f': there are no answers",
        "'g': expected every answer to be a string, got 1 (int)",
        "10 answers (a list of strings)",
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
        (["a"], ["a", "b"], ["a list of 1, the references a list of 2"]),
        ({"a": "a"}, ["a"], ["a dict of 1, the references a list of 1"]),
        ("ab", "ab", ["the predictions are a str"]),
        (["a"], [{"a"}], ["the answer to be a string, got {'a'} (set)"]),
    ],
)
def test_what_cannot_be_paired(predictions, references, said):
    with pytest.raises(DatasetError) as e:
        exact_match(predictions, references)
    for line in said:
        assert line in str(e.value)


def test_many_problems_are_counted():
    with pytest.raises(DatasetError, match="130 more"):
        exact_match([None] * 150, ["a"] * 150)  # type: ignore[list-item]


def test_groups_and_averages():
    metric = ExactMatch(averages={"mean": None, "some": ("a", "b"), "others": ("a", "z")})
    examples = [("a", "x"), ("a", "y"), ("a", "x"), ("a", "x"), ("b", "x"), ("c", "y")]
    for i, (group, prediction) in enumerate(examples):
        metric.add(i, prediction, "x", group=group)
    result = metric.result()
    assert result["acc"] == pytest.approx(4 / 6)
    assert (result["acc/a"], result["acc/b"], result["acc/c"]) == (0.75, 1, 0)
    assert result["acc/mean"] == pytest.approx(1.75 / 3)
    assert result["acc/some"] == pytest.approx(1.75 / 2)
    assert "acc/others" not in result  # a group is not there
    assert (result["num/a"], result["num"]) == (4, 6)
    assert metric.example_scores[1] == 0


def test_one_example_in_two_groups():
    metric = ExactMatch(overall=False)
    metric.add(1, "x", "x", group=("a", "all"))
    metric.add(2, "y", "x", group=("b", "all"))
    assert metric.result() == {
        "acc/a": 1, "acc/b": 0, "acc/all": 0.5, "num": 2, "skipped": 0, "num/a": 1, "num/b": 1,
        "num/all": 2,
    }  # fmt: skip


def matches(right: int, wrong: int) -> ExactMatch:
    return ExactMatch().add_all(["x"] * right + ["y"] * wrong, ["x"] * (right + wrong))


def test_share_is_as_wide_as_the_normal_approximation():
    interval = bootstrap(matches(300, 100), resamples=4000)["acc"]
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert interval.value == 0.75
    assert interval.low == pytest.approx(0.75 - half, abs=0.005)
    assert interval.high == pytest.approx(0.75 + half, abs=0.005)
    narrow = bootstrap(matches(300, 100), resamples=300, confidence=0.5)["acc"]
    assert interval.low < narrow.low < narrow.high < interval.high


def test_seed_decides_and_memory_does_not(monkeypatch: pytest.MonkeyPatch):
    first = bootstrap(matches(30, 20), resamples=50, seed=1)
    monkeypatch.setattr(metric_module, "_CELLS", 120)
    assert bootstrap(matches(30, 20), resamples=50, seed=1) == first
    assert bootstrap(matches(30, 20), resamples=50, seed=2) != first


def test_units_are_drawn_whole():
    metric = ExactMatch()
    for i in range(40):
        metric.add(i, "x" if i < 20 else "y", "x", unit=i < 20)
    drawn = bootstrap(metric, resamples=400)["acc"]
    assert (drawn.low, drawn.high) == (0.0, 1.0)


def test_pairs_are_drawn_whole():
    metric = PairedAccuracy()
    for i in range(20):
        metric.add(i, "a" if i < 10 else "b", PairAnswer(i // 2, "a"))
    drawn = bootstrap(metric, resamples=100)
    assert drawn["pair_acc"] == drawn["acc"]  # pairs are all right or all wrong here


def test_a_group_that_is_seldom_drawn():
    metric = ExactMatch(averages={"mean": None})
    for i in range(20):
        metric.add(i, "x" if i % 2 else "y", "x", group="rare" if i == 0 else "often")
    drawn = bootstrap(metric, resamples=60)
    assert drawn["acc/rare"].low == drawn["acc/rare"].high == 0
    assert np.isfinite([drawn["acc/mean"].low, drawn["acc/mean"].high]).all()


def test_scores_that_are_no_means_agree_with_duplicated_examples():
    texts = [("a cat", "a cat"), ("dog", "a dog"), ("", "bird"), ("redd", "red")]
    metric = TextRecognition().add_all([p for p, _ in texts], [r for _, r in texts])
    weights = np.array([[2.0, 0, 1, 3]])
    drawn = [text for text, w in zip(texts, [2, 0, 1, 3], strict=True) for _ in range(w)]
    expected = TextRecognition().add_all([p for p, _ in drawn], [r for _, r in drawn]).result()
    for name, value in metric.measure()(weights).items():
        assert value[0] == pytest.approx(expected[name]), name


@pytest.mark.parametrize("settings", [{"resamples": 0}, {"confidence": 1.0}, {"confidence": 0}])
def test_wrong_settings(settings):
    with pytest.raises(ConfigError, match="expected at least 1 resample"):
        bootstrap(matches(1, 1), **settings)
