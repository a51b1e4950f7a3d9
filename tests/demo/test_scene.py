"""Scenes keep their promises: inside, apart, in order; pairs differ when they say so."""

import itertools

import numpy as np
import pytest

from paligemma_jax.demo.scene import (
    CENTER_GAP,
    COLORS,
    GAP,
    HELD_OUT,
    KINDS,
    PAIRS,
    TRAINING,
    WORDS,
    Scene,
    apart,
    held_out_scenes,
    sample_pair,
    sample_scene,
    split_rng,
)

COUNT = 1500


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return held_out_scenes(3, COUNT)


def test_same_generator_same_scene():
    assert held_out_scenes(1, 20) == held_out_scenes(1, 20)
    assert held_out_scenes(1, 20) != held_out_scenes(2, 20)


def test_objects_are_inside_and_apart(scenes: list[Scene]):
    for scene in scenes:
        boxes = [shape.box for shape in scene.shapes]
        if scene.text is not None:
            assert min(scene.text.box) > 0 and max(scene.text.box) < 1
            assert all(apart(scene.text.box, box, 0.03) for box in boxes)
        assert all(min(box) > 0 and max(box) < 1 for box in boxes)
        assert all(apart(a, b, GAP - 1e-9) for a, b in itertools.combinations(boxes, 2))


def test_left_to_right_is_unambiguous(scenes: list[Scene]):
    for scene in scenes:
        centers = [shape.center[1] for shape in scene.shapes]
        assert np.all(np.diff(centers) >= CENTER_GAP - 1e-9)


def test_sizes_and_names(scenes: list[Scene]):
    shapes = [shape for scene in scenes for shape in scene.shapes]
    sides = [max(s.box[2] - s.box[0], s.box[3] - s.box[1]) for s in shapes]
    assert 0.139 < min(sides) < 0.15 and 0.38 < max(sides) < 0.421
    assert {(s.kind, s.color) for s in shapes} == set(itertools.product(KINDS, COLORS))
    assert all(abs(s.angle) <= 12 for s in shapes)


def test_shares_of_counts_and_text(scenes: list[Scene]):
    with_text = sum(scene.text is not None for scene in scenes) / COUNT
    text_only = sum(not scene.shapes for scene in scenes) / COUNT
    assert with_text == pytest.approx(0.45, abs=0.05)
    assert text_only == pytest.approx(0.12, abs=0.03)
    counts = np.bincount([len(s.shapes) for s in scenes if s.shapes], minlength=6)[1:]
    np.testing.assert_allclose(counts / counts.sum(), (0.22, 0.26, 0.24, 0.17, 0.11), atol=0.05)


def test_words_fit_the_promise(scenes: list[Scene]):
    assert len(set(WORDS)) == len(WORDS) >= 250
    assert all(word.isascii() and word.isupper() and 3 <= len(word) <= 6 for word in WORDS)
    texts = [scene.text for scene in scenes if scene.text is not None]
    for text in texts:
        assert text.string in WORDS or str(int(text.string)) == text.string
        assert text.capital >= 0.13 and abs(text.angle) <= 5
    assert 0.3 < np.mean([text.is_number for text in texts]) < 0.5


def test_pairs_differ_exactly_when_they_say_so():
    answers = []
    for index in range(600):
        first, second, same = sample_pair(split_rng(5, HELD_OUT + PAIRS, index))
        answers.append(same)
        assert first.text is None and second.text is None
        assert 1 <= len(first.shapes) <= 3 and 1 <= len(second.shapes) <= 3
        assert first.background != second.background
        for a, b in itertools.combinations(second.shapes, 2):
            assert apart(a.box, b.box, 0)
        assert all(min(s.box) >= 0 and max(s.box) <= 1 for s in second.shapes)
        alike = [s.name for s in first.shapes] == [s.name for s in second.shapes]
        assert alike == same
        if same:
            for a, b in zip(first.shapes, second.shapes, strict=True):
                np.testing.assert_allclose(a.center, b.center, atol=0.02)
    assert np.mean(answers) == pytest.approx(0.5, abs=0.07)


def test_splits_never_meet():
    splits = (TRAINING, HELD_OUT, TRAINING + PAIRS, HELD_OUT + PAIRS)
    assert len(set(splits)) == 4
    streams = {
        split_rng(seed, split, index).integers(2**63)
        for seed, split, index in itertools.product(range(12), splits, range(40))
    }
    assert len(streams) == 12 * 4 * 40


@pytest.mark.parametrize("bad", [(-1, 0, 0), (2**32, 0, 0), (0, 0, 2**32)])
def test_numbers_that_could_collide_are_refused(bad: tuple[int, int, int]):
    with pytest.raises(ValueError, match=r"2\*\*32"):
        split_rng(*bad)


def test_training_scenes_need_not_have_text():
    rng = np.random.default_rng(0)
    assert all(sample_scene(rng, allow_text=False).text is None for _ in range(30))
