"""Prompts and answers: right for fixed scenes, balanced over many."""

import collections
import dataclasses
import re

import numpy as np
import pytest
from flax import nnx

from paligemma_jax.demo.scene import (
    TRAINING,
    Scene,
    Shape,
    Text,
    box_around,
    extent,
    sample_scene,
    split_rng,
)
from paligemma_jax.demo.tasks import (
    SAMPLERS,
    Example,
    Label,
    MaskCodes,
    codec_crop,
    count_answer,
    detect_answer,
    examples,
    location_tokens,
    ocr_answer,
    plural,
    region,
    same_answer,
    sample_examples,
    sample_segment,
    segment_answer,
)
from paligemma_jax.models.mask_vae import MaskVAE, MaskVAEConfig
from paligemma_jax.processing.masks import MaskCodec


def shape(name: str, y: float, x: float, side: float = 0.2) -> Shape:
    colour, kind = name.split()
    half = side / 2
    return Shape(kind=kind, colour=colour, box=(y - half, x - half, y + half, x + half))


SCENE = Scene(
    shapes=(
        shape("red circle", 0.2, 0.15),
        shape("blue square", 0.5, 0.5),
        shape("red circle", 0.8, 0.6),
        shape("red star", 0.5, 0.85),
    ),
    text=None,
    background=0,
)
WORD = Text(string="SUN", box=(0.1, 0.1, 0.3, 0.6), font="DejaVuSans", capital=0.15)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, Example]]:
    pairs = []
    for index in range(1200):
        rng = split_rng(9, TRAINING, index)
        scene = sample_scene(rng)
        pairs += [(scene, example) for example in sample_examples(scene, rng, 4)]
    return pairs


@pytest.mark.parametrize(
    ("label", "plural_form", "number"),
    [
        (Label("red", "circle"), "red circles", "2"),
        (Label(None, "circle"), "circles", "2"),
        (Label("red", None), "red shapes", "3"),
        (Label(None, None), "shapes", "4"),
        (Label("green", "cross"), "green crosses", "0"),
    ],
)
def test_counts(label: Label, plural_form: str, number: str):
    assert plural(label) == plural_form
    prompt = f"answer en how many {plural_form} are there?"
    assert count_answer(SCENE, label) == Example(prompt, number, "count")


def test_boxes_come_in_prompt_order_then_left_to_right():
    example = detect_answer(SCENE, [Label("blue", "square"), Label("red", "circle")])
    assert example.prompt == "detect blue square ; red circle"
    assert example.answer == (
        "<loc0409><loc0409><loc0614><loc0614> blue square ; "
        "<loc0102><loc0051><loc0307><loc0256> red circle ; "
        "<loc0716><loc0512><loc0921><loc0716> red circle"
    )


def test_what_is_absent_is_left_out():
    assert detect_answer(SCENE, [Label("green", "cross")]).answer == ""
    both = detect_answer(SCENE, [Label("green", "cross"), Label(None, "star")])
    assert both.prompt == "detect green cross ; star"
    assert re.fullmatch(r"(<loc\d{4}>){4} star", both.answer)


def test_locations_stay_in_range():
    whole = Shape(kind="square", colour="red", box=(0.0, -0.01, 1.0, 1.01))
    assert location_tokens(whole) == "<loc0000><loc0000><loc1023><loc1023>"


@pytest.mark.parametrize(
    ("y", "x", "place"),
    [
        (0.1, 0.1, "top left"),
        (0.1, 0.5, "top"),
        (0.5, 0.9, "right"),
        (0.5, 0.5, "centre"),
        (0.9, 0.5, "bottom"),
        (0.9, 0.9, "bottom right"),
        (0.35, 0.5, None),
        (0.5, 0.65, None),
    ],
)
def test_regions(y: float, x: float, place: str | None):
    assert region(shape("red circle", y, x, 0.1)) == place


def test_plain_prompts():
    assert same_answer(True) == Example("answer en are these the same?", "yes", "same")
    assert ocr_answer(SCENE).answer == ""
    written = Scene(shapes=(), text=WORD, background=0)
    assert ocr_answer(written) == Example("ocr", "SUN", "ocr")


def test_every_task_once():
    found = [example.task for example in examples(SCENE, np.random.default_rng(0))]
    assert len(set(found)) == len(found)
    assert set(SAMPLERS) - {"ocr"} <= set(found)


def test_labels_of_one_prompt_never_share_an_object(drawn: list[tuple[Scene, Example]]):
    several = 0
    for scene, example in drawn:
        if example.task != "detect":
            continue
        names = example.prompt.removeprefix("detect ").split(" ; ")
        several += len(names) > 1
        boxes = [part.rpartition(" ")[0] for part in example.answer.split(" ; ")]
        assert len(boxes) == len(set(boxes)) <= max(len(scene.shapes), 1)
        for part in filter(None, example.answer.split(" ; ")):
            assert re.fullmatch(r"(<loc\d{4}>){4} (.+)", part)
            assert part.rpartition(">")[2].strip() in names
    assert several > 150


def test_questions_name_unique_things(drawn: list[tuple[Scene, Example]]):
    spellings = collections.Counter()
    for scene, example in drawn:
        if example.task == "colour":
            match = re.fullmatch(r"answer en what (colou?r) is the (\w+)\?", example.prompt)
            assert match is not None
            spellings[match[1]] += 1
            assert [s.colour for s in scene.shapes if s.kind == match[2]] == [example.answer]
        if example.task == "where":
            name = example.prompt.removeprefix("answer en where is the ")[:-1]
            places = [region(s) for s in scene.shapes if name in (s.name, s.kind)]
            assert places == [example.answer]
    assert 0.4 < spellings["color"] / spellings.total() < 0.6


def test_answers_are_balanced(drawn: list[tuple[Scene, Example]]):
    answers: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for _, example in drawn:
        answers[example.task][example.answer] += 1
    assert 0.4 < answers["exists"]["yes"] / answers["exists"].total() < 0.6
    assert 0.15 < answers["count"]["0"] / answers["count"].total() < 0.35
    assert all(answers["count"][str(number)] for number in range(6))
    assert 0.02 < answers["detect"][""] / answers["detect"].total() < 0.17
    assert 0 < answers["ocr"][""] / answers["ocr"].total() < 0.15
    assert len(answers["where"]) == 9
    assert set(answers) == set(SAMPLERS)


def test_existence_is_true(drawn: list[tuple[Scene, Example]]):
    for scene, example in drawn:
        if example.task == "exists":
            name = example.prompt.removeprefix("answer en is there a ")[:-1]
            there = any(name in (s.name, s.kind) for s in scene.shapes)
            assert example.answer == ("yes" if there else "no")


def test_weights_choose_the_tasks():
    rng = np.random.default_rng(0)
    only = sample_examples(SCENE, rng, 3, {"count": 1.0})
    assert len(only) == 3 and {example.task for example in only} == {"count"}
    assert len(sample_examples(SCENE, rng, 5, {"caption_en": 1.0})) == 5
    with pytest.raises(ValueError, match="caption_en"):
        sample_examples(Scene(shapes=(), text=WORD, background=0), rng, 1, {"colour": 1.0})


CODES = MaskCodes(
    {("circle", 0, 0): tuple(range(16)), ("square", 0, 0): (127,) * 16, ("star", 0, 5): (1,) * 16}
)


def test_segment_writes_box_then_codes_then_label():
    circles = segment_answer(SCENE, [Label("red", "circle")], CODES)
    assert circles.prompt == "segment red circle"
    masks = "".join(f"<seg{i:03d}>" for i in range(16))
    first, second = circles.answer.split(" ; ")
    assert re.fullmatch(rf"(<loc\d{{4}}>){{4}}{masks} red circle", first)
    assert re.fullmatch(rf"(<loc\d{{4}}>){{4}}{masks} red circle", second)
    both = segment_answer(SCENE, [Label("blue", "square"), Label("red", "star")], CODES)
    assert both.prompt == "segment blue square ; red star"
    assert both.answer.count("<seg127>") == both.answer.count("<seg001>") == 16
    assert segment_answer(SCENE, [Label("green", "circle")], CODES).answer == ""


def test_segment_asks_for_two_masks_at_most():
    counts = collections.Counter()
    for seed in range(200):
        example = sample_segment(SCENE, np.random.default_rng(seed), CODES)
        assert example is not None
        counts[example.answer.count("<seg") // 16] += 1
    assert set(counts) == {0, 1, 2} and counts[0] < counts[1]


def test_codes_of_a_shape_are_those_of_its_mask():
    codec = MaskCodec(MaskVAE(MaskVAEConfig(embedding_dim=8), rngs=nnx.Rngs(0)))
    star = Shape(kind="star", colour="red", box=(0.2, 0.3, 0.5, 0.6), angle=3.0, style=0.5)
    height, width = extent("star", 3.0, 0.5)
    large = dataclasses.replace(star, box=box_around(0.5, 0.5, 0.9 * height, 0.9 * width))
    key = ("star", 6, 5)
    codes = MaskCodes({key: tuple(codec.encode(codec_crop(large)[None])[0].tolist())})
    assert len(codes.of(star)) == 16
    # The small star's own crop decodes to nearly the same mask.
    crops = codec_crop(large) > 0.5, codec_crop(star) > 0.5
    assert (crops[0] & crops[1]).sum() / (crops[0] | crops[1]).sum() > 0.8
