"""Metrics of short answers on cases worked out by hand."""

from typing import Any

import pytest

from paligemma_jax.errors import DatasetError
from paligemma_jax.evaluation.answer_metrics import (
    is_relaxed_match,
    process_answer,
    vqa_v2_accuracy,
)
from paligemma_jax.evaluation.metrics import (
    Choice,
    PairAnswer,
    anls,
    anls_score,
    choice_accuracy,
    count_accuracy,
    exact_match,
    option_letter_accuracy,
    paired_accuracy,
    read_count,
    simple_vqa,
    vqa_v2,
    yes_no,
)
from paligemma_jax.evaluation.tasks import find_task


def test_exact_match_forgives_only_outer_space():
    predictions, references = [" cat ", "Cat", "cats", "a cat"], ["cat"] * 4
    assert exact_match(predictions, references)["acc"] == 0.25
    assert exact_match(predictions, references, lower=True)["acc"] == 0.5


@pytest.mark.parametrize(
    ("text", "processed"),
    [
        ("The Cat", "cat"), ("an apple a day", "apple day"), ("none", "0"), ("ten two", "10 2"),
        ("eleven", "eleven"), ("dont", "don't"), ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),  # a slip of the official list
        ("yall'd've", "y'all'd've"),
        ("ows'at", "ows'at"),  # two apostrophes short: not on the list
        ("ow's'at", "'ow's'at"), ("black-and-white", "black and white"),
        ("black -white", "black white"), ("black - white", "black white"), ("1,000", "1000"),
        ("1,000-2", "10002"),  # a comma in a number makes all marks vanish
        ("a,b", "b"), ("yes, sir", "yes sir"), ("st. john", "st john"), ("3.5", "3.5"),
        ("5.", "5"), ("u.s.a.", "usa"), ("what?!", "what"), ("it's", "it's"),
        ("$5 & 10%", "$5 & 10%"),
    ],
)  # fmt: skip
def test_official_processing(text: str, processed: str):
    assert process_answer(text) == processed


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_leave_one_out(matches: int, accuracy: float):
    answers = ["cat"] * matches + [f"dog {i}" for i in range(10 - matches)]
    assert vqa_v2_accuracy("the cat", answers) == pytest.approx(accuracy)


def test_unanimous_answers_are_compared_as_they_are():
    assert vqa_v2_accuracy("The STOP", ["the stop"] * 10) == 0
    assert vqa_v2_accuracy(" the\tstop\n", ["the stop"] * 10) == 1
    assert vqa_v2_accuracy("The STOP", ["the stop"] * 9 + ["stop"]) == 1


def test_vqa_v2_of_lists_wants_ten_answers():
    assert vqa_v2(["2", "no"], [["two"] * 9 + ["3"], ["yes"] * 10])["acc"] == 0.5
    with pytest.raises(DatasetError, match="expected 10 answers, got 3"):
        vqa_v2(["a"], [["a"] * 3])


def test_simple_vqa():
    result = simple_vqa(["cat", "Cat"], [["cat", "cat", "dog"], ["cat"] * 5])
    assert result["acc"] == pytest.approx((2 / 3 + 0) / 2)
    assert result["acc_any"] == 0.5
    assert result["anls"] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("hello", ["hello"], 1), ("helo", ["hello"], 0.8), ("HELLO  World ", ["hello world"], 1),
        ("ab", ["cd", "ac", "abc"], 2 / 3),
        ("ab", ["ac"], 0),  # at the threshold
        ("", ["a"], 0), ("", [""], 1),
    ],
)  # fmt: skip
def test_anls(prediction: str, answers: list[str], score: float):
    assert anls_score(prediction, answers) == pytest.approx(score)
    assert anls([prediction], [answers])["anls"] == pytest.approx(score)


def test_anls_of_big_vision_does_not_strip():
    assert anls([" abc"], [["abc"]], process=False)["anls"] == 0.75
    assert anls(["A"], [["a"]], process=False) == {"anls": 1, "acc": 1, "num": 1, "skipped": 0}


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("105", "100", True), ("95", "100", True), ("105.1", "100", False), ("5%", "0.05", True),
        ("5 %", "5%", True), ("0.051", "5%", True), ("-105", "-100", True),
        ("-100", "100", False), ("0", "0", True),
        ("0.0", "0", False),  # nothing is within 5 % of zero but its own spelling
        ("Yes", "yes ", True), ("yes", "100", False), ("nan", "NaN", True), ("inf", "100", False),
        ("100", "inf", False), ("1,000", "1000", False),
    ],
)  # fmt: skip
def test_relaxed_accuracy(prediction: str, answer: str, right: bool):
    assert is_relaxed_match(prediction, answer) == right
    assert not is_relaxed_match("A", "a", lower=False)


@pytest.mark.parametrize(
    ("text", "count"),
    [("3", 3), (" Three ", 3), ("none", 0), ("twenty", 20), ("twenty-one", None), ("2.5", None),
     ("-1", None), ("two cats", None), ("", None), ("²", None), ("9" * 5000, None)],
)  # fmt: skip
def test_read_count(text: str, count: int | None):
    assert read_count(text) == count


def test_counts():
    result = count_accuracy(["two", "5", "many", "1"], [2, 3, 4, 2])
    assert result["acc"] == 0.25
    assert result["no_number"] == 0.25
    assert result["mae"] == pytest.approx(1)
    assert result["rmse"] == pytest.approx((5 / 3) ** 0.5)
    assert "mae" not in count_accuracy(["many"], [4])
    assert count_accuracy(["3"], ["three"])["acc"] == 1  # type: ignore[list-item]
    with pytest.raises(DatasetError, match="a number of at least 0"):
        count_accuracy(["3"], [-1])
    with pytest.raises(DatasetError, match="the count to be a number, got 'lots'"):
        count_accuracy(["3"], ["lots"])  # type: ignore[list-item]


def test_option_letters():
    texts = ["The answer is B.", "the answer is c.", "B", "So the answer is B.", "The answer is B"]
    result = option_letter_accuracy(texts, ["B", "The answer is B.", "b", "b", "b"])
    assert result["acc"] == pytest.approx(1 / 5)
    assert result["parsefail"] == pytest.approx(3 / 5)
    with pytest.raises(DatasetError, match="'yes' names no letter"):
        option_letter_accuracy(["The answer is B."], ["yes"])


def test_choices():
    choice = Choice(("cat", "dog", "Dog"), "dog")
    result = choice_accuracy([" dog", "cat", "Dog", "bird"], [choice] * 4)
    assert (result["acc"], result["no_choice"]) == (0.25, 0.25)
    with pytest.raises(DatasetError, match="'cow' is none of the choices"):
        choice_accuracy(["cow"], [Choice(("cat", "dog"), "cow")])


def test_yes_no():
    answers = ["Yes", "yes", "no", "no", "maybe", "yes."]
    result = yes_no(answers, ["yes", "no", "no", True, False, True])
    assert result["acc"] == pytest.approx(2 / 6)
    assert result["precision"] == pytest.approx(1 / 2)
    assert result["recall"] == pytest.approx(1 / 3)
    assert result["f1"] == pytest.approx(2 / 5)
    assert result["yes_ratio"] == pytest.approx(2 / 6)
    assert result["valid"] == pytest.approx(4 / 6)
    nothing = yes_no(["no"], ["no"])
    assert (nothing["acc"], nothing["precision"], nothing["recall"], nothing["f1"]) == (1, 0, 0, 0)
    with pytest.raises(DatasetError, match="neither yes nor no"):
        yes_no(["yes"], ["true"])


def test_pairs():
    answers = ["(a)", "(b)", "(A)", "(a)"]
    right = [PairAnswer(1, "(a)"), PairAnswer(1, "(b)"), PairAnswer(2, "(a)"), PairAnswer(2, "(b)")]
    result = paired_accuracy(answers, right)
    assert (result["pair_acc"], result["acc"]) == (0.5, 0.75)
    assert paired_accuracy(answers[:3], right[:3])["pair_acc"] == 1


@pytest.mark.parametrize(
    ("task", "examples", "scores"),
    [
        ("vqav2", [("yes/no", "yes", ["yes"] * 10), ("number", "4", ["3"] * 10)],
         {"acc": 0.5, "acc/yes/no": 1, "acc/number": 0}),
        ("chartqa", [("human", "10", "10"), ("human", "x", "10"), ("augmented", "10.2", "10"),
                     ("augmented", "10", "10")], {"relaxed_acc/mean": 0.75, "acc": 0.5}),
        ("tallyqa", [("simple", "1", 1), ("complex", "1", 1), ("complex", "zero", 1)],
         {"acc/simple": 1, "acc/complex": 0.5, "mae/complex": 0.5}),
        ("pope", [("random", "yes", "yes"), ("random", "no", "yes"), ("popular", "yes", "yes"),
                  ("adversarial", "no", "yes")], {"acc/mean": 0.5, "recall/random": 0.5}),
        ("rsvqa_hr", [("comp", "yes", "yes"), ("comp", "no", "yes"), ("presence", "yes", "yes"),
                      ("count", "no", "yes"), ("area", "no", "yes")],
         {"acc/nonum": 0.75, "acc/mean": 0.375}),
    ],
)  # fmt: skip
def test_tasks_with_groups(task: str, examples: list[Any], scores: dict[str, float]):
    metric = find_task(task).metric()
    for i, (group, prediction, reference) in enumerate(examples):
        metric.add(i, prediction, reference, group=group)
    result = metric.result()
    assert {name: result[name] for name in scores} == pytest.approx(scores)
