"""Every benchmark, by name.

Which metric each published task is measured with.

What a benchmark is: how data is written, what is asked, how answers are judged.

Figures that PaliGemma's authors report, by task and model with its resolution.

Of PaliGemma: the table of transfers in big_vision's README (validation or test as there); of
PaliGemma 2: Table 13 of arXiv 2412.03555, means of five runs, and Table 11 for detection. All are
of models fine-tuned for the task, but where `notes` of the benchmark says otherwise.

From the fields of a line to a prompt and to the right answer.

Boxes and masks of benchmarks: the right ones from a line, the found ones from an answer.

Rows as the public builders of tensorflow-datasets prepare them -> the fields of a benchmark.

Columns and splits from big_vision's datasets/ and evaluation settings of its transfers. NLVR2,
MaRVL and OCR-VQA have no public builder; theirs are those that the configurations name.
"""

import dataclasses
import enum
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paligemma_jax.data.readers import column, images_in, texts_of
from paligemma_jax.errors import (
    ConfigError,
    DatasetError,
    InvalidMaskError,
    InvalidPromptError,
    PaliGemmaError,
)
from paligemma_jax.evaluation.answer_metrics import (
    ANLS,
    Choice,
    ChoiceAccuracy,
    CountAccuracy,
    ExactMatch,
    OfPair,
    OptionLetterAccuracy,
    PairedAccuracy,
    Perplexity,
    Reading,
    RelaxedAccuracy,
    SimpleVQAAccuracy,
    VQAv2Accuracy,
    YesNo,
)
from paligemma_jax.evaluation.caption_metrics import BLEU, CIDEr, Meteor, RougeL
from paligemma_jax.evaluation.detection_metrics import (
    BoxDetection,
    FoundBoxes,
    ObjectMask,
    ReferringSegmentation,
    TrueBoxes,
)
from paligemma_jax.evaluation.metric import (
    Accumulator,
    ByGroup,
    Grouped,
    Misfit,
    Together,
    check_text,
    check_texts,
)
from paligemma_jax.processing import prompts
from paligemma_jax.processing.detections import Segmentations
from paligemma_jax.processing.image import ImageSource
from paligemma_jax.processing.location_tokens import parse_answer
from paligemma_jax.processing.masks import RLE, MaskCodec, load_mask, mask_from_coco, tight_corners


@dataclasses.dataclass(frozen=True)
class Measured:
    """How a task is measured: `make()` gives an empty metric, `main` names the published figure."""

    make: Callable[[], Accumulator]
    main: str


def _mean_over_groups(metric: Accumulator, overall: bool = True) -> ByGroup:
    return ByGroup(metric, {"mean": None}, overall)


def _tasks_captions() -> Accumulator:
    return Together(CIDEr(), BLEU(), RougeL(), Meteor())


_XGQA = ("bn", "de", "id", "ko", "pt", "ru", "zh")
_XM3600_OTHERS = tuple(
    "ar bn cs da de el es fa fi fil fr he hi hr hu id it ja ko mi nl no pl pt quz ro ru sv sw te "
    "th tr uk vi zh".split()
)  # fmt: skip
_COCO35L_OTHERS = tuple(code for code in _XM3600_OTHERS if code != "quz")

_CAPTIONS = Measured(_tasks_captions, "cider")
_EXACT = Measured(ExactMatch, "acc")
_SIMPLE_VQA = Measured(SimpleVQAAccuracy, "acc")

# References of a task with groups are `Grouped(group, reference)`.
TASKS: dict[str, Measured] = {
    # One of several answers; the groups of VQAv2 are yes/no, number, other.
    "vqav2": Measured(lambda: ByGroup(VQAv2Accuracy()), "acc"),
    "textvqa": Measured(VQAv2Accuracy, "acc"),
    "okvqa": _SIMPLE_VQA,
    "aokvqa-da": _SIMPLE_VQA,
    "vizwizvqa": _SIMPLE_VQA,
    # One right answer.
    "aokvqa-mc": Measured(ChoiceAccuracy, "acc"),
    "ai2d": Measured(ChoiceAccuracy, "acc"),
    "gqa": _EXACT,
    "ocrvqa": Measured(lambda: ExactMatch(lower=True), "acc"),
    "nlvr2": _EXACT,
    "msvd-qa": _EXACT,
    "msrvtt-qa": _EXACT,
    "activitynet-qa": _EXACT,
    "scienceqa": Measured(OptionLetterAccuracy, "acc"),
    # By language; big_vision averages the seven of xGQA without English.
    "xgqa": Measured(lambda: ByGroup(ExactMatch(), {"mean": _XGQA}), "acc/mean"),
    "marvl": Measured(lambda: _mean_over_groups(ExactMatch()), "acc/mean"),
    # By question type: unweighted mean over the types without numbers.
    "rsvqa-lr": Measured(
        lambda: ByGroup(
            ExactMatch(), {"mean": None, "nonum": ("comp", "presence", "rural_urban")}
        ),
        "acc/nonum",
    ),
    "rsvqa-hr": Measured(
        lambda: ByGroup(ExactMatch(), {"mean": None, "nonum": ("comp", "presence")}), "acc/nonum"
    ),
    # By split human and augmented.
    "chartqa": Measured(
        lambda: ByGroup(RelaxedAccuracy(), {"mean": ("human", "augmented")}), "relaxed_acc/mean"
    ),
    "docvqa": Measured(lambda: ANLS(process=False), "anls"),
    "infovqa": Measured(lambda: ANLS(process=False), "anls"),
    "stvqa": Measured(lambda: ANLS(process=False), "anls"),
    # By difficulty, simple and complex.
    "tallyqa": Measured(lambda: ByGroup(CountAccuracy()), "acc/complex"),
    "countbenchqa": Measured(CountAccuracy, "acc"),
    # By split random, popular and adversarial.
    "pope": Measured(lambda: _mean_over_groups(YesNo()), "acc/mean"),
    "mmvp": Measured(PairedAccuracy, "pair_acc"),
    # Captions.
    **dict.fromkeys(
        ("cococap", "nocaps", "textcaps", "scicap", "screen2words", "widgetcap",
         "msrvtt-cap", "activitynet-cap", "vatex-cap"), _CAPTIONS,
    ),  # fmt: skip
    "xm3600": Measured(
        lambda: ByGroup(CIDEr(), {"mean": None, "others": _XM3600_OTHERS}, overall=False),
        "cider/others",
    ),
    "coco35l": Measured(
        lambda: ByGroup(CIDEr(), {"mean": None, "others": _COCO35L_OTHERS}, overall=False),
        "cider/others",
    ),
    # Pictures.
    **dict.fromkeys(
        ("refcoco", "refcoco+", "refcocog"), Measured(ReferringSegmentation, "miou")
    ),
    "detection": Measured(BoxDetection, "AP"),
    # Text.
    "ocr": Measured(Reading, "levenshtein_ratio"),
    "perplexity": Measured(Perplexity, "nll_per_token"),
}  # fmt: skip


def metric_for(task: str) -> Accumulator:
    """An empty metric of a task of `TASKS`; raises ConfigError for another name."""
    if task not in TASKS:
        raise ConfigError(
            f"There is no task {task!r}. One of {', '.join(sorted(TASKS))} fits. Call for example: "
            'metric_for("docvqa")'
        )
    return TASKS[task].make()


Row = Mapping[str, Any]  # one line of a data file


class Answer(enum.Enum):
    """What is made of the model's words before they are judged."""

    TEXT = "text"
    MASK = "mask"
    BOXES = "boxes"
    MASKS = "masks"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One published task.

    Attributes:
      name: as `paligemma eval --task` has it; `title` for people.
      source: the paper of the data.
      example: one line of the data file, with every field that is read.
      prompt: of a line.
      reference: the right answer of a line, as the metric takes it; raises Misfit.
      task: of `metrics.tasks.TASKS`; the name where it is not given.
      measure: instead of a task's.
      answer: what the words are read as.
      max_new_tokens, beams: how answers are made; one beam is greedy.
      published: the figure `measured.main` of published models, by name such as
        "paligemma-3b-448", in the unit of the tables.
      scale: what the figure is multiplied with in tables.
      card: what figures by name are on the model's own card, in the unit of the tables.
      group: the field that names the kind of a line, where figures are by kind.
      notes: what to know before numbers are compared.
    """

    name: str
    title: str
    source: str
    example: Row
    prompt: Callable[[Row], str]
    reference: Callable[[Row], Any]
    task: str = ""
    measure: Measured | None = None
    answer: Answer = Answer.TEXT
    max_new_tokens: int = 32
    beams: int = 1
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    card: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scale: float = 100.0
    group: str | None = None
    notes: str = ""

    @property
    def measured(self) -> Measured:
        """Its metric and the figure that is published."""
        return self.measure or TASKS[self.task or self.name]


_PALIGEMMA = ("paligemma-3b-224", "paligemma-3b-448", "paligemma-3b-896")
_PALIGEMMA2 = tuple(
    f"paligemma2-{size}-{resolution}" for resolution in (224, 448) for size in ("3b", "10b", "28b")
)


def _row(first: str, second: str = "") -> dict[str, float]:
    """Of PaliGemma at 224, 448, 896; and of PaliGemma 2 3B, 10B, 28B at 224 and then at 448."""
    pairs = [*zip(_PALIGEMMA, first.split(), strict=False)]
    pairs += [*zip(_PALIGEMMA2, second.split(), strict=False)]
    return {model: float(value) for model, value in pairs if value != "-"}


PUBLISHED: dict[str, dict[str, float]] = {
    "vqav2": _row("83.19 85.64", "83.0 84.3 84.5 84.8 85.8 85.8"),
    "textvqa": _row("55.47 73.15 76.48", "59.6 64.0 64.7 75.2 76.6 76.2"),
    "okvqa": _row("63.54 63.15", "64.2 68.0 71.2 64.1 68.6 70.6"),
    "aokvqa-da": _row("61.85 63.22", "64.2 68.9 70.2 67.9 70.8 71.2"),
    "aokvqa-mc": _row("76.37 76.90", "79.7 83.7 84.7 82.5 85.9 87.0"),
    "vizwizvqa": _row("73.7 75.52", "76.4 78.1 78.7 77.5 78.6 78.9"),
    "ai2d": _row("72.12 73.28", "74.7 83.1 83.2 76.0 84.4 84.6"),
    "gqa": _row("65.61 67.03", "66.2 67.2 67.3 68.1 68.3 68.3"),
    "xgqa": _row("58.37 59.07", "58.6 61.4 61.1 60.4 62.6 62.1"),
    "nlvr2": _row("90.02 88.93", "91.4 93.9 94.2 91.6 93.7 94.1"),
    "marvl": _row("80.57 76.78", "83.5 89.5 90.6 82.7 89.1 89.7"),
    "ocrvqa": _row("73.24 75.60 75.90", "73.4 74.7 75.3 75.7 76.3 76.6"),
    "scienceqa": _row("95.39 95.93", "96.1 98.2 98.2 96.2 98.5 98.6"),
    "rsvqa-lr": _row("92.65 93.11", "93.0 92.8 93.5 92.7 93.1 93.7"),
    "rsvqa-hr": _row("92.61 92.79", "92.7 92.6 92.7 92.8 92.8 92.8"),
    "chartqa": _row("57.08 71.36", "58.2 61.3 57.85 71.6 78.25 73.2"),
    "docvqa": _row("43.74 78.02 84.77", "39.9 43.9 44.9 73.6 76.6 76.1"),
    "infovqa": _row("28.46 40.47 47.75", "25.2 33.6 36.4 37.5 47.8 46.7"),
    "stvqa": _row("63.29 81.82 84.40", "61.9 64.3 65.1 80.5 82.0 81.8"),
    "tallyqa": _row("69.56 72.27", "70.3 73.4 74.2 73.6 76.7 76.8"),
    "countbenchqa": _row("81.9 83.1", "81.0 84.0 86.4 82.0 85.3 87.4"),
    "mmvp": _row("47.33 45.33"),
    "pope": _row("85.98 86.97"),
    "cococap": _row("141.92 144.60", "141.3 143.7 144.0 143.4 145.0 145.2"),
    "nocaps": _row("121.72 123.58", "123.1 126.3 127.1 123.5 126.9 127.0"),
    "textcaps": _row("127.48 153.94", "127.5 137.9 139.9 152.1 157.7 153.6"),
    "scicap": _row("162.25 181.49", "165.1 159.5 156.9 183.3 177.2 172.7"),
    "screen2words": _row("117.57 119.59", "113.3 117.8 122.8 114.0 119.1 123.4"),
    "widgetcap": _row("136.07 148.36", "138.1 139.8 138.8 151.4 151.9 148.9"),
    "xm3600": _row("41.3 41.9", "42.8 44.5 45.2 43.2 44.6 45.2"),
    "coco35l": _row("115.8 118.0", "113.9 115.8 116.5 115.8 117.2 117.2"),
    "msrvtt-cap": _row("70.54", "68.5 72.1 -"),
    "activitynet-cap": _row("34.62", "34.2 35.9 -"),
    "vatex-cap": _row("79.73", "80.8 82.7 -"),
    "msvd-qa": _row("60.22", "61.1 62.5 -"),
    "msrvtt-qa": _row("50.09", "50.5 51.9 -"),
    "activitynet-qa": _row("50.78", "51.3 53.2 -"),
    "refcoco": _row("73.40 75.57 76.94", "73.4 75.9 75.0 76.3 78.2 77.3"),
    "refcoco+": _row("68.32 69.76 72.18", "68.6 72.0 70.3 72.1 74.4 72.8"),
    "refcocog": _row("67.65 70.17 72.22", "68.3 71.4 70.5 72.3 74.4 73.0"),
    "detection": _row("28.7 37.0 41.1", "30.4 30.3 - 38.5 39.2 -"),
}


Prompt = Callable[[Row], str]
Reference = Callable[[Row], Any]


def template(text: str) -> Prompt:
    """`{name}` stands for the text of that field, such as "answer en {question}"."""

    def prompt(row: Row) -> str:
        try:
            return text.format_map(_Texts(row))
        except (ValueError, IndexError, AttributeError) as e:
            raise Misfit(f"the prompt {text!r} is no template: {e}") from e

    return prompt


def field(name: str) -> Reference:
    """What the field holds; the metric checks it."""
    return lambda row: _get(row, name)


def grouped(name: str, reference: Reference) -> Reference:
    """Of the group that the field `name` says."""
    return lambda row: Grouped(check_text(_get(row, name), name), reference(row))


def choice(row: Row) -> Choice:
    """Of the fields choices and answer."""
    choices = check_texts(_get(row, "choices"), "choice")
    return Choice(tuple(choices), check_text(_get(row, "answer"), "answer"))


def choice_prompt(row: Row) -> str:
    """big_vision's prompt with choices, of A-OKVQA and AI2D; both spaces and the tabs are its."""
    choices = check_texts(_get(row, "choices"), "choice")
    question = check_text(_get(row, "question"), "question")
    return f"answer en  {question} choose from: " + " \t ".join(choices)


def science_prompt(row: Row) -> str:
    """big_vision's prompt of ScienceQA; "N/A" where there is no hint."""
    choices = check_texts(_get(row, "choices"), "choice")
    options = ", ".join(f"({chr(65 + i)}) {text}" for i, text in enumerate(choices))
    question = check_text(_get(row, "question"), "question")
    hint = check_text(row.get("hint") or "N/A", "hint")
    return f"Question: {question}\nContext: {hint}\nOptions: {options}\nAnswer:"


def detect_prompt(row: Row) -> str:
    """Of the field labels: a list, or "cat ; dog"."""
    try:
        return prompts.detect(_get(row, "labels"))
    except (InvalidPromptError, TypeError) as e:
        raise Misfit(f"the labels do not fit: {e}") from e


def of_pair(row: Row) -> OfPair:
    """Of the fields pair and answer."""
    pair = _get(row, "pair")
    if not isinstance(pair, str | int):
        raise Misfit(f"the pair is {pair!r} of type {type(pair).__name__}, no name or number")
    return OfPair(pair, check_text(_get(row, "answer"), "answer"))


def _get(row: Row, name: str) -> Any:
    if name not in row:
        raise Misfit(f"the field {name!r} is missing; there are {', '.join(map(repr, row))}")
    return row[name]


class _Texts(dict[str, str]):
    """The fields of a line as texts, for a template."""

    def __init__(self, row: Mapping[str, Any]):
        super().__init__()
        self._row = row

    def __missing__(self, name: str) -> str:
        return check_text(_get(self._row, name), name)


def true_boxes(row: Row) -> TrueBoxes:
    """Of the field objects: a list of label, box (x1, y1, x2, y2 in pixels), and crowd and area."""
    objects = row.get("objects")
    if not isinstance(objects, Sequence) or isinstance(objects, str):
        raise Misfit("the field 'objects' is no list of objects with label and box")
    if not all(isinstance(one, Mapping) and {"label", "box"} <= one.keys() for one in objects):
        raise Misfit("an object lacks its label or its box")
    areas = [one.get("area") for one in objects]
    return TrueBoxes(
        [one["box"] for one in objects],
        [one["label"] for one in objects],
        [bool(one.get("crowd")) for one in objects],
        None if None in areas else areas,
    )


def found_boxes(objects: Sequence[Mapping[str, Any]]) -> FoundBoxes:
    """Of objects as predictions keep them: label, box and score."""
    return FoundBoxes(
        [one["box"] for one in objects],
        [one["label"] for one in objects],
        [one["score"] for one in objects],
    )


def true_mask(row: Row, folder: Path) -> ObjectMask:
    """Of the field mask (a file beside the pictures), or segmentation (COCO's) and size.

    The box is that of the field box (x1, y1, x2, y2 in pixels), or the one around the mask; it is
    kept as parts of the picture.
    """
    try:
        if "mask" in row:
            mask = load_mask(folder / str(row["mask"]))
        elif "segmentation" in row and "size" in row:
            height, width = row["size"]
            mask = mask_from_coco(row["segmentation"], height, width)
        else:
            raise Misfit("neither 'mask' nor 'segmentation' with 'size' [height, width] is there")
        y1, x1, y2, x2 = tight_corners(mask)
    except (PaliGemmaError, TypeError, ValueError) as e:
        raise Misfit(f"the mask cannot be read: {e}") from e
    if "box" not in row:
        return ObjectMask(mask, (x1, y1, x2, y2))
    try:
        left, top, right, bottom = (float(value) for value in row["box"])
    except (TypeError, ValueError) as e:
        raise Misfit(f"the box {row['box']!r} is not x1, y1, x2, y2") from e
    height, width = mask.shape
    return ObjectMask(mask, (left / width, top / height, right / width, bottom / height))


def found_mask(text: str, codec: MaskCodec, height: int, width: int) -> ObjectMask | None:
    """The first object with a mask in an answer, in a picture of height x width pixels.

    As big_vision's evaluator: corners are cut to whole pixels, the decoded 64 x 64 crop is resized
    bilinearly and cut at half. None for an answer without a mask, or with a box without pixels.
    """
    box = next((one for one in parse_answer(text).objects if one.codes), None)
    if box is None:
        return None
    x1, x2 = int(box.x1 * width), int(box.x2 * width)
    y1, y2 = int(box.y1 * height), int(box.y2 * height)
    if x2 <= x1 or y2 <= y1:
        return None
    crop = codec.decode(np.array([box.codes]))[0]
    resized = Image.fromarray(crop).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = np.asarray(resized) > 0.5
    return ObjectMask(mask, (box.x1, box.y1, box.x2, box.y2))


def found_masks(text: str, codec: MaskCodec, height: int, width: int) -> np.ndarray:
    """bool[n, height, width] of all objects in an answer, empty for one with a box alone."""
    return Segmentations.decoded(parse_answer(text), width, height, codec.decode).masks


_QUESTION = {"id": "17", "image": "17.jpg", "question": "what is on the table?"}
_ASK = template("answer en {question}")


def _benchmark(name: str, title: str, source: str, **rest: Any) -> Benchmark:
    return Benchmark(name, title, source, published=PUBLISHED.get(name, {}), **rest)


def _answers(name: str, title: str, source: str, **rest: Any) -> Benchmark:
    settings = {"prompt": _ASK, "reference": field("answers")} | rest
    example = _QUESTION | {"answers": ["a cup", "cup", "mug"]}
    return _benchmark(name, title, source, example=example, **settings)


def _answer(name: str, title: str, source: str, group: str = "", **rest: Any) -> Benchmark:
    reference = field("answer")
    example = _QUESTION | {"answer": "cup"}
    if group:
        reference = grouped(group, reference)
        example |= {group: rest.pop("kind", "")}
    settings = {"prompt": _ASK, "reference": reference, "group": group or None} | rest
    return _benchmark(name, title, source, **({"example": example} | settings))


def _registry_captions(name: str, title: str, source: str, **rest: Any) -> Benchmark:
    example = {"id": "17", "image": "17.jpg", "captions": ["a cup on a table", "a white cup"]}
    settings = {"prompt": template("caption en"), "reference": field("captions")} | rest
    return _benchmark(name, title, source, **({"example": example} | settings))


def _languages(name: str, title: str, source: str) -> Benchmark:
    example = {"id": "17 de", "image": "17.jpg", "language": "de", "captions": ["eine Tasse"]}
    reference = grouped("language", field("captions"))
    prompt = template("caption {language}")
    return _registry_captions(
        name, title, source, example=example, prompt=prompt, reference=reference, group="language"
    )


def _referring(name: str, title: str, source: str) -> Benchmark:
    example = {
        "id": "17", "image": "17.jpg", "expression": "left cup", "mask": "masks/17.png",
        "box": [10, 20, 110, 90],
    }  # fmt: skip
    return _benchmark(
        name, title, source, example=example, prompt=template("segment {expression}"),
        reference=field("mask"), answer=Answer.MASK, max_new_tokens=48,
        notes="Models fine-tuned for it are asked without the word segment: "
        "--prompt '{expression}'. Published: validation.",
    )  # fmt: skip


_VIDEO = {"id": "17", "images": ["17/00.jpg", "17/01.jpg"]}
_VIDEO_NOTE = "The frames of the video are given as images; big_vision takes 16 (8 of MSVD)."


def _video_question(name: str, title: str, source: str) -> Benchmark:
    example = _VIDEO | {"question": "what does the man hold?", "answer": "cup"}
    return _answer(name, title, source, example=example, max_new_tokens=64, notes=_VIDEO_NOTE)


def _video_captions(name: str, title: str, source: str) -> Benchmark:
    example = _VIDEO | {"captions": ["a man holds a cup"]}
    return _registry_captions(
        name, title, source, example=example, max_new_tokens=64, notes=_VIDEO_NOTE
    )


def _all() -> Iterable[Benchmark]:
    # Several people's answers.
    people = _QUESTION | {"answers": ["cup"] * 10}
    yield _benchmark(
        "vqav2", "VQAv2", "Goyal et al. 2017", prompt=_ASK, group="answer_type",
        example=people | {"answer_type": "other"},
        reference=grouped("answer_type", field("answers")),
        notes="Published: test-std (PaliGemma), minival (PaliGemma 2).",
    )  # fmt: skip
    yield _benchmark("textvqa", "TextVQA", "Singh et al. 2019", example=people, prompt=_ASK,
                     reference=field("answers"))  # fmt: skip
    yield _answers("okvqa", "OKVQA", "Marino et al. 2019")
    yield _answers("aokvqa-da", "A-OKVQA, direct answer", "Schwenk et al. 2022")
    yield _answers("vizwizvqa", "VizWiz VQA", "Gurari et al. 2018", max_new_tokens=48)
    # One answer.
    choices = _QUESTION | {"choices": ["cup", "cat"], "answer": "cup"}
    yield _benchmark("aokvqa-mc", "A-OKVQA, multiple choice", "Schwenk et al. 2022",
                     prompt=choice_prompt, example=choices, reference=choice)  # fmt: skip
    yield _benchmark("ai2d", "AI2D", "Kembhavi et al. 2016", prompt=choice_prompt,
                     example=choices, reference=choice)  # fmt: skip
    yield _answer("gqa", "GQA", "Hudson and Manning 2019")
    yield _answer("xgqa", "xGQA", "Pfeiffer et al. 2022", "language", kind="de",
                  notes="The published figure is the mean over seven languages.")  # fmt: skip
    two = {"id": "17", "images": ["17-left.jpg", "17-right.jpg"], "question": "both are red",
           "answer": "True"}  # fmt: skip
    yield _answer("nlvr2", "NLVR2", "Suhr et al. 2019", example=two)
    yield _answer("marvl", "MaRVL", "Liu et al. 2021", "language", kind="sw",
                  example=two | {"language": "sw"})  # fmt: skip
    yield _answer("ocrvqa", "OCR-VQA", "Mishra et al. 2019")
    science = choices | {"hint": "Look.", "choices": ["cup", "cat"], "answer": "A"}
    yield _benchmark("scienceqa", "ScienceQA", "Lu et al. 2022", example=science,
                     prompt=science_prompt, reference=field("answer"))  # fmt: skip
    yield _answer("rsvqa-lr", "RSVQA, low resolution", "Lobry et al. 2020", "type", kind="presence")
    yield _answer("rsvqa-hr", "RSVQA, high resolution", "Lobry et al. 2020", "type", kind="comp")
    yield _answer("chartqa", "ChartQA", "Masry et al. 2022", "split", kind="human",
                  prompt=template("{question}"), max_new_tokens=48,
                  notes="Mean of the splits human and augmented.")  # fmt: skip
    yield _answers("docvqa", "DocVQA", "Mathew et al. 2021", prompt=template("{question}"),
                   notes="Published: test (PaliGemma), validation (PaliGemma 2).")  # fmt: skip
    yield _answers("infovqa", "InfographicVQA", "Mathew et al. 2022", max_new_tokens=48)
    yield _answers("stvqa", "ST-VQA", "Biten et al. 2019", max_new_tokens=48)
    yield _answer("tallyqa", "TallyQA", "Acharya et al. 2019", "difficulty", kind="complex",
                  example=_QUESTION | {"answer": 3, "difficulty": "complex"},
                  notes="Published: complex questions.")  # fmt: skip
    yield _answer("countbenchqa", "CountBenchQA", "Paiss et al. 2023; Beyer et al. 2024",
                  example=_QUESTION | {"answer": 3})  # fmt: skip
    yield _answer("pope", "POPE", "Li et al. 2023", "split", max_new_tokens=8,
                  example=_QUESTION | {"answer": "yes", "split": "random"},
                  notes="Published: a model fine-tuned for VQAv2, mean of the splits.")  # fmt: skip
    yield _benchmark("mmvp", "MMVP", "Tong et al. 2024", prompt=_ASK, reference=of_pair,
                     example=_QUESTION | {"pair": 9, "answer": "(a)"},
                     notes="Published: a model fine-tuned for VQAv2.")  # fmt: skip
    # Captions.
    yield _registry_captions("cococap", "COCO captions", "Chen et al. 2015", beams=2)
    yield _registry_captions("nocaps", "NoCaps", "Agrawal et al. 2019", beams=2,
                    notes="Published: a model fine-tuned for COCO captions.")  # fmt: skip
    yield _registry_captions("textcaps", "TextCaps", "Sidorov et al. 2020", beams=3)
    yield _registry_captions("scicap", "SciCap", "Hsu et al. 2021", max_new_tokens=96)
    yield _registry_captions("screen2words", "Screen2Words", "Wang et al. 2021", max_new_tokens=24)
    yield _registry_captions("widgetcap", "Widget Captioning", "Li et al. 2020",
                    notes="The widget has a red outline in the picture.")  # fmt: skip
    yield _languages("xm3600", "Crossmodal-3600", "Thapliyal et al. 2022")
    yield _languages("coco35l", "COCO-35L", "Thapliyal et al. 2022")
    # Videos.
    yield _video_question("msvd-qa", "MSVD-QA", "Xu et al. 2017")
    yield _video_question("msrvtt-qa", "MSRVTT-QA", "Xu et al. 2017")
    yield _video_question("activitynet-qa", "ActivityNet-QA", "Yu et al. 2019")
    yield _video_captions("msrvtt-cap", "MSR-VTT captions", "Xu et al. 2016")
    yield _video_captions("activitynet-cap", "ActivityNet captions", "Krishna et al. 2017")
    yield _video_captions("vatex-cap", "VATEX", "Wang et al. 2019")
    # Objects and text.
    yield _referring("refcoco", "RefCOCO segmentation", "Yu et al. 2016")
    yield _referring("refcoco+", "RefCOCO+ segmentation", "Yu et al. 2016")
    yield _referring("refcocog", "RefCOCOg segmentation", "Mao et al. 2016")
    yield _benchmark(
        "detection", "Detection, COCO protocol", "Lin et al. 2014", reference=true_boxes,
        prompt=detect_prompt, answer=Answer.BOXES, max_new_tokens=512,
        example={"id": "17", "image": "17.jpg", "labels": ["cup", "cat"],
                 "objects": [{"label": "cup", "box": [10, 20, 110, 90]}]},
        notes="Boxes are ranked by scores of this library. Published: COCO, models fine-tuned to "
        "score boxes.",
    )  # fmt: skip
    yield _benchmark("ocr", "Reading", "Roboflow's focused scene OCR", prompt=template("ocr"),
                     example={"id": "17", "image": "17.jpg", "text": "EXIT 5"},
                     reference=field("text"), max_new_tokens=128)  # fmt: skip


BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _all()}


def find_benchmark(name: str) -> Benchmark:
    """A benchmark of `BENCHMARKS`; raises ConfigError for another name."""
    if name not in BENCHMARKS:
        raise ConfigError(
            f"There is no benchmark {name!r}. One of {', '.join(sorted(BENCHMARKS))} fits. See: "
            "paligemma eval --list"
        )
    return BENCHMARKS[name]


_PAIR = {"question": "sentence", "answer": "label"}
_KIND = {"type": "question_type"}
_COLUMNS: Mapping[str, Mapping[str, str]] = {  # field of the benchmark -> column of the builder
    "vqav2": {"question": "question_text"},
    "aokvqa-da": {"answers": "direct_answers"},
    "aokvqa-mc": {"choices": "multiple_choice_possible_answers"},
    "ai2d": {"choices": "possible_answers"},
    "nlvr2": _PAIR,
    "marvl": _PAIR,
    "rsvqa-lr": _KIND,
    "rsvqa-hr": _KIND,
    "countbenchqa": {"answer": "number"},
    "cococap": {"captions": "captions.text"},
    "nocaps": {"captions": "texts"},
    "textcaps": {"captions": "texts"},
    "widgetcap": {"captions": "texts"},
    "screen2words": {"captions": "summary"},
    "scicap": {"captions": "caption/lowercase_and_token_and_remove_figure_index"},
}
_TEXTS = ("captions", "answers", "choices")  # fields that are lists
_BOTH = ("image_left", "image_right")


def builder_images(row: Row) -> tuple[ImageSource, ...]:
    """The pictures of a row, two of NLVR2; raises DatasetError."""
    if "image" in row or "images" in row:
        return images_in(row, "image" if "image" in row else "images")
    return images_in(row, _BOTH if _BOTH[0] in row else "image")


def builder_fields(name: str, row: Row, directory: Path, split: str) -> Row:
    """`row` with the fields of the benchmark `name`, as far as a builder's columns tell them.

    The last two directories and the split tell kinds that no column does. Raises Misfit.
    """
    try:
        found: dict[str, Any] = {}
        for field, source in _COLUMNS.get(name, {}).items():
            if source.partition(".")[0] in row and not isinstance(row.get(field), list):
                value = column(row, source)
                found[field] = list(texts_of(value, source)) if field in _TEXTS else value
        found |= _derived(name, row, directory, split)
    except DatasetError as e:
        raise Misfit(str(e)) from e
    return dict(row) | found


def _derived(name: str, row: Row, directory: Path, split: str) -> Row:
    """What takes more than another name."""
    if name == "aokvqa-mc" and "multiple_choice_correct_idx" in row:
        return _chosen(row)
    if name == "scienceqa" and isinstance(row.get("answer"), int):
        return {"answer": chr(ord("A") + row["answer"])}
    if name in ("rsvqa-lr", "rsvqa-hr") and row.get("answers"):
        return {"answer": row["answers"][0]}
    if name == "tallyqa" and "issimple" in row:
        return {"difficulty": "simple" if row["issimple"] == 1 else "complex"}
    if name == "chartqa" and "split" not in row:
        return {"split": directory.parent.name}
    if name == "pope" and "split" not in row:
        return {"split": directory.parent.name.removeprefix("pope_")}
    if name == "xgqa" and "language" not in row:
        return {"language": split.rpartition("_")[2]}
    if name.startswith("refcoco") and "objects" in row:
        return _referred(row)
    return {}


def _chosen(row: Row) -> Row:
    choices, number = row["multiple_choice_possible_answers"], row["multiple_choice_correct_idx"]
    if not 0 <= number < len(choices):
        raise Misfit(f"the right choice is number {number} of {len(choices)}; test data has none")
    return {"answer": choices[number]}


def _referred(row: Row) -> Row:
    """Of a row with one object and one expression, as the splits named _flat have."""
    masks, boxes = list(column(row, "objects.mask")), list(column(row, "objects.bbox"))
    names = [texts_of(one, "sentence") for one in column(row, "objects.refs.sentence")]
    if len(masks) != 1 or len(names[0]) != 1:
        raise Misfit(
            f"there are {len(masks)} objects in a row; one with one expression is measured, as in "
            "the splits validation_flat, testA_flat, ..."
        )
    try:
        with Image.open(io.BytesIO(masks[0])) as image:
            mask = load_mask(np.asarray(image))
    except (OSError, TypeError, InvalidMaskError) as e:
        raise Misfit(f"the mask cannot be read: {e}") from e
    height, width = mask.shape
    y1, x1, y2, x2 = (float(value) for value in boxes[0])
    return {
        "expression": names[0][0],
        "segmentation": RLE.from_mask(mask).to_coco(),
        "size": [height, width],
        "box": [x1 * width, y1 * height, x2 * width, y2 * height],
        "objects": None,
        "question_id": int(column(row, "objects.refs.id")[0][0]),
    }
