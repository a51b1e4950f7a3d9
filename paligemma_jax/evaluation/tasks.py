"""How each published task is scored: metric, reference, decoding, and the published scores.

Prompts, fields and data sets are those of `paligemma_jax.data.tasks`, by the same names. Scores are
of models fine-tuned for the task, but where `notes` says otherwise: of PaliGemma from the table of
transfers in big_vision's README (validation or test as there); of PaliGemma 2 from Table 13 of
arXiv 2412.03555, means of five runs, and Table 11 for detection.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from paligemma_jax.data import tasks as data
from paligemma_jax.data.readers import column
from paligemma_jax.errors import ConfigError, PaliGemmaError
from paligemma_jax.evaluation.answer_metrics import (
    Choice,
    ChoiceAccuracy,
    CountAccuracy,
    ExactMatch,
    OptionLetterAccuracy,
    PairAnswer,
    PairedAccuracy,
    RelaxedAccuracy,
    SimpleVQAAccuracy,
    VQAv2Accuracy,
    YesNo,
)
from paligemma_jax.evaluation.caption_metrics import CaptionScores, CIDEr
from paligemma_jax.evaluation.detection_metrics import (
    BoxDetection,
    ObjectMask,
    ReferringSegmentation,
    TrueBoxes,
)
from paligemma_jax.evaluation.metric import InvalidExample, Metric
from paligemma_jax.evaluation.text_metrics import ANLS, TextRecognition
from paligemma_jax.hub.catalogue import MODELS
from paligemma_jax.processing.masks import load_mask, mask_from_coco, tight_corners

# What the model's words are read as before they are scored: "mask" is the first object of an answer
# in words, "boxes" and "masks" are all objects of `detect` and `segment`.
Output = Literal["text", "mask", "boxes", "masks"]
Fields = Mapping[str, Any]  # of an example, as they were read
# The right answer of an example, as the metric takes it: of the task, its fields, and the folder of
# its files. Raises DatasetError.
Reference = Callable[[data.Task, Fields, Path], Any]


def one_answer(task: data.Task, fields: Fields, folder: Path) -> str:
    """The right answer."""
    return task.answers_of(fields)[0]


def all_answers(task: data.Task, fields: Fields, folder: Path) -> list[str]:
    """Every right answer."""
    return list(task.answers_of(fields))


def choice(task: data.Task, fields: Fields, folder: Path) -> Choice:
    """The right answer among the choices."""
    return Choice(tuple(column(fields, "choices")), task.answers_of(fields)[0])


def pair_answer(task: data.Task, fields: Fields, folder: Path) -> PairAnswer:
    """The right answer, and the pair that the question belongs to."""
    return PairAnswer(column(fields, "pair"), task.answers_of(fields)[0])


def true_boxes(task: data.Task, fields: Fields, folder: Path) -> TrueBoxes:
    """Of the field objects: a list of label, box (x1, y1, x2, y2 in pixels), and crowd and area."""
    objects = fields.get("objects")
    if not isinstance(objects, Sequence) or isinstance(objects, str):
        raise InvalidExample("expected 'objects' to be a list of objects with label and box")
    if not all(isinstance(one, Mapping) and {"label", "box"} <= one.keys() for one in objects):
        raise InvalidExample("an object has no label or no box")
    areas = [one.get("area") for one in objects]
    return TrueBoxes(
        [one["box"] for one in objects],
        [one["label"] for one in objects],
        [bool(one.get("crowd")) for one in objects],
        None if None in areas else areas,
    )


def true_mask(task: data.Task, fields: Fields, folder: Path) -> ObjectMask:
    """Of the field mask (a file in the folder), or segmentation (COCO's) and size.

    The box is that of the field box (x1, y1, x2, y2 in pixels), or the one around the mask; it is
    kept as fractions of the image.
    """
    try:
        if "mask" in fields:
            mask = load_mask(folder / str(fields["mask"]))
        elif "segmentation" in fields and "size" in fields:
            height, width = fields["size"]
            mask = mask_from_coco(fields["segmentation"], height, width)
        else:
            raise InvalidExample(
                "expected a 'mask', or a 'segmentation' with its 'size' [height, width]"
            )
        y1, x1, y2, x2 = tight_corners(mask)
        height, width = mask.shape
        if "box" in fields:
            left, top, right, bottom = (float(value) for value in fields["box"])
            x1, y1, x2, y2 = left / width, top / height, right / width, bottom / height
    except InvalidExample:
        raise
    except (PaliGemmaError, TypeError, ValueError) as e:
        raise InvalidExample(f"the mask or its box cannot be read: {e}") from e
    return ObjectMask(mask, (x1, y1, x2, y2))


@dataclasses.dataclass(frozen=True)
class EvaluationTask:
    """A task as it is evaluated.

    Attributes:
      task: what is asked, and of which data.
      metric: makes the empty metric.
      main: the score that is published.
      reference: the right answer of an example.
      group: the field that names the group of an example, where scores are per group.
      sample: fields of the example that `--list` shows, where they are not the usual ones.
      output: what the words are read as.
      max_new_tokens, num_beams: how answers are made; one beam is greedy.
      published: the score of published models, by name such as "paligemma-3b-448", as the tables
        have it: times `scale`.
      model_card: scores by name on the model's own card, times `scale`.
      notes: what to know before numbers are compared.
    """

    task: data.Task
    metric: Callable[[], Metric]
    main: str
    reference: Reference = one_answer
    group: str = ""
    sample: Fields = dataclasses.field(default_factory=dict)
    output: Output = "text"
    max_new_tokens: int = 32
    num_beams: int = 1
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    model_card: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scale: float = 100.0
    notes: str = ""

    @property
    def name(self) -> str:
        """Of the task."""
        return self.task.name

    @property
    def example(self) -> Fields:
        """One example with every field that is read."""
        names = ("id", "image", *self.task.prompt_fields, self.task.answers, self.group)
        usual = {name: _SAMPLE[name] for name in names if name in _SAMPLE}
        given = {**usual, **self.sample}
        return {k: v for k, v in given.items() if k != "image" or "images" not in given}


def find_task(name: str) -> EvaluationTask:
    """A task of `TASKS`; raises ConfigError for another name."""
    if name not in TASKS:
        raise ConfigError(
            f"There is no evaluation task {name!r}. The tasks are {', '.join(sorted(TASKS))}. See: "
            "paligemma eval --list"
        )
    return TASKS[name]


_SAMPLE: Fields = {
    "id": "17",
    "image": "17.jpg",
    "question": "what is on the table?",
    "answer": "cup",
    "answers": ["a cup", "cup", "mug"],
    "captions": ["a cup on a table", "a white cup"],
    "choices": ["cup", "cat"],
    "expression": "left cup",
    "mask": "masks/17.png",
    "language": "de",
    "labels": ["cup", "cat"],
    "objects": [{"label": "cup", "box": [10, 20, 110, 90]}],
    "text": "EXIT 5",
}
_PALIGEMMA = ("paligemma-3b-224", "paligemma-3b-448", "paligemma-3b-896")
_PALIGEMMA2 = tuple(
    f"paligemma2-{size}-{resolution}" for resolution in (224, 448) for size in ("3b", "10b", "28b")
)
# big_vision averages the seven languages of xGQA without English.
_XGQA = ("bn", "de", "id", "ko", "pt", "ru", "zh")
_XM3600_OTHERS = tuple(
    "ar bn cs da de el es fa fi fil fr he hi hr hu id it ja ko mi nl no pl pt quz ro ru sv sw te "
    "th tr uk vi zh".split()
)
_COCO35L_OTHERS = tuple(code for code in _XM3600_OTHERS if code != "quz")
_FRAMES = ["17/00.jpg", "17/01.jpg"]


def _tuned(task: str, part: int = 0) -> str:
    """Scores of the checkpoints fine-tuned for a task, in one part of their published metric."""
    models = (MODELS.get(f"paligemma-3b-ft-{task}-{size}") for size in (224, 448, 896))
    return " ".join(f"{model.score.values[part]}" for model in models if model and model.score)


def _task(
    name: str,
    metric: Callable[[], Metric],
    main: str,
    paligemma: str = "",
    paligemma2: str = "",
    **settings: Any,
) -> EvaluationTask:
    """Published: PaliGemma at 224, 448, 896; PaliGemma 2 3B, 10B, 28B at 224 and then at 448."""
    scores = [*zip(_PALIGEMMA, paligemma.split(), strict=False)]
    scores += [*zip(_PALIGEMMA2, paligemma2.split(), strict=False)]
    published = {model: float(value) for model, value in scores if value != "-"}
    return EvaluationTask(data.TASKS[name], metric, main, published=published, **settings)


def _captions(name: str, *published: str, **settings: Any) -> EvaluationTask:
    return _task(name, CaptionScores, "cider", *published, reference=all_answers, **settings)


def _languages(name: str, others: tuple[str, ...], *published: str) -> EvaluationTask:
    averages = {"mean": None, "others": others}
    metric = partial(CIDEr, averages=averages, overall=False)
    return _task(name, metric, "cider/others", *published, reference=all_answers, group="language",
                 sample={"id": "17 de", "captions": ["eine Tasse"]})  # fmt: skip


def _video(name: str, *published: str) -> EvaluationTask:
    settings: dict[str, Any] = dict(
        max_new_tokens=64,
        notes="The frames of the video are given as images; big_vision takes 16 (8 of MSVD).",
    )
    if name.endswith("_cap"):
        sample = {"images": _FRAMES, "captions": ["a man holds a cup"]}
        return _captions(name, *published, sample=sample, **settings)
    sample = {"images": _FRAMES, "question": "what does the man hold?"}
    return _task(name, ExactMatch, "acc", *published, sample=sample, **settings)


def _segmentation(name: str, *published: str) -> EvaluationTask:
    return _task(
        name, ReferringSegmentation, "miou", *published, reference=true_mask, output="mask",
        max_new_tokens=48, sample={"box": [10, 20, 110, 90]},
        notes="Models fine-tuned for it are asked without the word segment: "
        "--prompt '{expression}'. Published: validation.",
    )  # fmt: skip


_LIST: dict[str, Any] = dict(reference=all_answers)
_TEN: dict[str, Any] = dict(reference=all_answers, sample={"answers": ["cup"] * 10})
_ANLS = partial(ANLS, process=False)
_TWO_IMAGES = {"images": ["17-left.jpg", "17-right.jpg"], "question": "both are red",
               "answer": "True"}  # fmt: skip
_VQAV2_MODEL = "Published: a model fine-tuned for VQAv2"

TASKS: dict[str, EvaluationTask] = {task.name: task for task in (
    _task("vqav2", VQAv2Accuracy, "acc", _tuned("vqav2"), "83.0 84.3 84.5 84.8 85.8 85.8",
          group="answer_type", reference=all_answers,
          sample={"answers": ["cup"] * 10, "answer_type": "other"},
          notes="Published: test-std (PaliGemma), minival (PaliGemma 2)."),
    _task("textvqa", VQAv2Accuracy, "acc", _tuned("textvqa"), "59.6 64.0 64.7 75.2 76.6 76.2",
          **_TEN),
    _task("okvqa", SimpleVQAAccuracy, "acc", _tuned("okvqa"), "64.2 68.0 71.2 64.1 68.6 70.6",
          **_LIST),
    _task("aokvqa_da", SimpleVQAAccuracy, "acc", _tuned("aokvqa-da"),
          "64.2 68.9 70.2 67.9 70.8 71.2",
          **_LIST),
    _task("vizwizvqa", SimpleVQAAccuracy, "acc", _tuned("vizwizvqa"),
          "76.4 78.1 78.7 77.5 78.6 78.9",
          max_new_tokens=48, **_LIST),
    _task("aokvqa_mc", ChoiceAccuracy, "acc", _tuned("aokvqa-mc"), "79.7 83.7 84.7 82.5 85.9 87.0",
          reference=choice),
    _task("ai2d", ChoiceAccuracy, "acc", _tuned("ai2d"), "74.7 83.1 83.2 76.0 84.4 84.6",
          reference=choice),
    _task("gqa", ExactMatch, "acc", _tuned("gqa"), "66.2 67.2 67.3 68.1 68.3 68.3"),
    _task("xgqa", partial(ExactMatch, averages={"mean": _XGQA}), "acc/mean", "58.37 59.07",
          "58.6 61.4 61.1 60.4 62.6 62.1", group="language", sample={"language": "de"},
          notes="The published score is the mean over seven languages."),
    _task("nlvr2", ExactMatch, "acc", _tuned("nlvr2"), "91.4 93.9 94.2 91.6 93.7 94.1",
          sample=_TWO_IMAGES),
    _task("marvl", partial(ExactMatch, averages={"mean": None}), "acc/mean", "80.57 76.78",
          "83.5 89.5 90.6 82.7 89.1 89.7", group="language",
          sample=_TWO_IMAGES | {"language": "sw"}),
    _task("ocrvqa", partial(ExactMatch, lower=True), "acc", _tuned("ocrvqa"),
          "73.4 74.7 75.3 75.7 76.3 76.6"),
    _task("science_qa", OptionLetterAccuracy, "acc", _tuned("science-qa"),
          "96.1 98.2 98.2 96.2 98.5 98.6",
          sample={"hint": "Look.", "answer": "A"}),
    # By question type: unweighted mean over the types without numbers.
    _task("rsvqa_lr",
          partial(ExactMatch,
                  averages={"mean": None, "nonum": ("comp", "presence", "rural_urban")}),
          "acc/nonum", _tuned("rsvqa-lr"), "93.0 92.8 93.5 92.7 93.1 93.7", group="type",
          sample={"type": "presence"}),
    _task("rsvqa_hr",
          partial(ExactMatch, averages={"mean": None, "nonum": ("comp", "presence")}), "acc/nonum",
          _tuned("rsvqa-hr"),
          "92.7 92.6 92.7 92.8 92.8 92.8", group="type", sample={"type": "comp"}),
    _task("chartqa", partial(RelaxedAccuracy, averages={"mean": ("human", "augmented")}),
          "relaxed_acc/mean", "57.08 71.36", "58.2 61.3 57.85 71.6 78.25 73.2", group="split",
          sample={"split": "human"}, max_new_tokens=48,
          notes="Mean of the splits human and augmented."),
    _task("docvqa", _ANLS, "anls", _tuned("docvqa"), "39.9 43.9 44.9 73.6 76.6 76.1",
          notes="Published: test (PaliGemma), validation (PaliGemma 2).", **_LIST),
    _task("infovqa", _ANLS, "anls", _tuned("infovqa"), "25.2 33.6 36.4 37.5 47.8 46.7",
          max_new_tokens=48, **_LIST),
    _task("stvqa", _ANLS, "anls", _tuned("stvqa"), "61.9 64.3 65.1 80.5 82.0 81.8",
          max_new_tokens=48, **_LIST),
    _task("tallyqa", CountAccuracy, "acc/complex", _tuned("tallyqa", 1),
          "70.3 73.4 74.2 73.6 76.7 76.8",
          group="difficulty", sample={"answer": 3, "difficulty": "complex"},
          notes="Published: complex questions."),
    _task("countbenchqa", CountAccuracy, "acc", "81.9 83.1", "81.0 84.0 86.4 82.0 85.3 87.4",
          sample={"answer": 3}),
    _task("pope", partial(YesNo, averages={"mean": None}), "acc/mean", "85.98 86.97",
          group="split", sample={"answer": "yes", "split": "random"}, max_new_tokens=8,
          notes=f"{_VQAV2_MODEL}, mean of the splits."),
    _task("mmvp", PairedAccuracy, "pair_acc", "47.33 45.33", reference=pair_answer,
          sample={"pair": 9, "answer": "(a)"}, notes=f"{_VQAV2_MODEL}."),
    _captions("cococap", _tuned("cococap"), "141.3 143.7 144.0 143.4 145.0 145.2", num_beams=2),
    _captions("nocaps", "121.72 123.58", "123.1 126.3 127.1 123.5 126.9 127.0", num_beams=2,
              notes="Published: a model fine-tuned for COCO captions."),
    _captions("textcaps", _tuned("textcaps"), "127.5 137.9 139.9 152.1 157.7 153.6", num_beams=3),
    _captions("scicap", _tuned("scicap"), "165.1 159.5 156.9 183.3 177.2 172.7", max_new_tokens=96),
    _captions("screen2words", _tuned("screen2words"), "113.3 117.8 122.8 114.0 119.1 123.4",
              max_new_tokens=24),
    _captions("widgetcap", _tuned("widgetcap"), "138.1 139.8 138.8 151.4 151.9 148.9",
              notes="The widget has a red outline in the image."),
    _languages("xm3600", _XM3600_OTHERS, "41.3 41.9", "42.8 44.5 45.2 43.2 44.6 45.2"),
    _languages("coco35l", _COCO35L_OTHERS, _tuned("coco35l", 1),
              "113.9 115.8 116.5 115.8 117.2 117.2"),
    _video("msvd_qa", "60.22", "61.1 62.5 -"),
    _video("msrvtt_qa", "50.09", "50.5 51.9 -"),
    _video("activitynet_qa", "50.78", "51.3 53.2 -"),
    _video("msrvtt_cap", "70.54", "68.5 72.1 -"),
    _video("activitynet_cap", "34.62", "34.2 35.9 -"),
    _video("vatex_cap", "79.73", "80.8 82.7 -"),
    _segmentation("refcoco_seg", _tuned("refcoco-seg"), "73.4 75.9 75.0 76.3 78.2 77.3"),
    _segmentation("refcocoplus_seg", _tuned("refcoco-seg", 1), "68.6 72.0 70.3 72.1 74.4 72.8"),
    _segmentation("refcocog_seg", _tuned("refcoco-seg", 2), "68.3 71.4 70.5 72.3 74.4 73.0"),
    _task("detection", BoxDetection, "AP", "28.7 37.0 41.1", "30.4 30.3 - 38.5 39.2 -",
          reference=true_boxes, output="boxes", max_new_tokens=512,
          notes="Boxes are ranked by scores of this library. Published: COCO, models fine-tuned to "
          "score boxes."),
    _task("ocr", TextRecognition, "levenshtein_ratio", max_new_tokens=128),
)}  # fmt: skip
