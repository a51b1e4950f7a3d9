"""Every published task, once: the prompt, the fields of an example, and where the data is.

Training (configs/transfers.py) and evaluation (paligemma_jax.evaluation.tasks) add what is theirs
by the same names. Names, columns, splits and prompts are those of big_vision's
configs/proj/paligemma/transfers and datasets/.
"""

import contextlib
import dataclasses
import string
from collections.abc import Mapping
from typing import Any

from paligemma_jax.data.readers import (
    Example,
    ImageColumns,
    column,
    images_in,
    is_whole,
    record_of,
    texts_of,
)
from paligemma_jax.data.record import Record
from paligemma_jax.errors import ConfigError, DatasetError, PaliGemmaError
from paligemma_jax.processing import prompts
from paligemma_jax.processing.image import ImageSource

IMAGE_FIELDS = ("image", "images", "image_left", "image_right")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked about an image, and where its public data is.

    Attributes:
      name: of the task everywhere, as big_vision spells it; `title` for people.
      source: the paper of the data.
      prompt: a template of fields such as "answer en {question}". `{choices}` are separated as
        big_vision separates them, `{options}` are the choices with letters.
      answers: the field with the right answer, or with several.
      columns: the column of the public builder for a field, where names differ; a dot leads into a
        column of several.
      directories: below tensorflow_datasets' own, with a space between; "" without a data set.
      train, final, validation: splits to train on, to train on for published numbers (validation
        data too), and to validate on.
      text_length: tokens of prompt and answer in training.
    """

    name: str
    title: str
    source: str
    prompt: str = "answer en {question}"
    answers: str = "answer"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    directories: str = ""
    train: str = "train"
    final: str = "train+val"
    validation: str = "val"
    text_length: int = 32

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """The fields that the prompt is made of."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name]
        names = ["choices" if name == "options" else name for name in names]
        return tuple(dict.fromkeys(names))

    def fields(self, example: Example, columns: Mapping[str, str] | None = None) -> Example:
        """`example` with the fields that prompt and answers need, from the builder's columns.

        `columns` come before those of the task. One with the fields themselves stays as it is.
        """
        found = dict(example)
        for field, name in {**self.columns, **(columns or {})}.items():
            with contextlib.suppress(DatasetError):
                found[field] = column(example, name)
        return found

    def prompt_of(self, fields: Example) -> str:
        """The prompt; raises DatasetError for missing fields and other than text."""
        return fill(self.prompt, fields)

    def answers_of(self, fields: Example) -> tuple[str, ...]:
        """Every right answer; raises DatasetError.

        With choices the answer may be a number from 0 up.
        """
        value = column(fields, self.answers)
        if is_whole(value):
            if "choices" not in self.prompt_fields:
                return (str(value),)
            choices = texts_of(column(fields, "choices"), "choices")
            if not 0 <= value < len(choices):
                raise DatasetError(
                    f"expected {self.answers!r} to be 0 to {len(choices) - 1} with {len(choices)} "
                    f"choices, got {value} (test data has no answers)"
                )
            value = _letter(int(value)) if "{options}" in self.prompt else choices[int(value)]
        answers = texts_of(value, self.answers)
        if "{options}" in self.prompt and len(answers[0]) == 1:
            return (f"The answer is {answers[0].upper()}.",)
        return answers


def fill(template: str, fields: Example) -> str:
    """The template with the text of each field in the place of its name; raises DatasetError."""
    try:
        return template.format_map(_PromptFields(fields))
    except PaliGemmaError:
        raise
    except (ValueError, IndexError, AttributeError) as e:
        raise DatasetError(f"the prompt {template!r} is not a template: {e}") from e


class _PromptFields(dict[str, str]):
    """The fields of an example as texts of a prompt."""

    def __init__(self, fields: Example):
        super().__init__()
        self._fields = fields

    def __missing__(self, name: str) -> str:
        if name == "choices":
            return " \t ".join(texts_of(column(self._fields, "choices"), "choices"))
        if name == "options":
            choices = texts_of(column(self._fields, "choices"), "choices")
            return ", ".join(f"({_letter(n)}) {text}" for n, text in enumerate(choices))
        if name == "hint":
            hint = self._fields.get("hint")
            return "N/A" if hint is None else _text(hint, "hint") or "N/A"
        if name == "labels":
            return " ; ".join(prompts.split_labels(column(self._fields, "labels")))
        text = _text(column(self._fields, name), name)
        if not text.strip():
            raise DatasetError(f"{name!r} is empty")
        return text


def _text(value: Any, name: str) -> str:
    texts = texts_of(value, name)
    if len(texts) != 1 or isinstance(value, list | tuple):
        raise DatasetError(f"expected {name!r} to be one text, got a list")
    return texts[0]


def _letter(number: int) -> str:
    return chr(ord("A") + number)


def images_of(example: Example) -> tuple[ImageSource, ...]:
    """The image of an example, or its images (a video, NLVR2); raises DatasetError."""
    name = next((name for name in ("image", "images") if name in example), None)
    if name is None and "image_left" in example:
        return images_in(example, ("image_left", "image_right"))
    return images_in(example, name or "image")


@dataclasses.dataclass(frozen=True)
class PromptReader(ImageColumns):
    """Examples of any data set, with a prompt of their columns.

        PromptReader("answer en {question}", "answers.text")
        PromptReader("caption de", "caption", image="photo")

    Attributes:
      prompt: a template of columns.
      answers: a column with one answer or several, or with a number.
      image: the column of images, or a tuple of several.
    """

    prompt: str = "caption en"
    answers: str = "caption"

    def __call__(self, example: Example, record_id: str) -> Record:
        value = column(example, self.answers)
        answers = (str(value),) if is_whole(value) else texts_of(value, self.answers)
        return record_of(
            images_in(example, self.image), fill(self.prompt, example), answers, record_id
        )


@dataclasses.dataclass(frozen=True)
class TaskReader:
    """Examples of a published task: of its public builder, or with evaluation's fields.

    Attributes:
      task: a name of `TASKS`.
      question, answers: columns, where the data set has others than the builder.
    """

    task: str
    question: str = ""
    answers: str = ""

    @property
    def image_fields(self) -> tuple[str, ...]:
        """The columns of images."""
        return IMAGE_FIELDS

    def __call__(self, example: Example, record_id: str) -> Record:
        task = find(self.task)
        given = {"question": self.question, task.answers: self.answers}
        fields = task.fields(example, {field: name for field, name in given.items() if name})
        return record_of(
            images_of(example), task.prompt_of(fields), task.answers_of(fields), record_id
        )


def find(name: str) -> Task:
    """The task of `TASKS`; raises ConfigError for another name."""
    if name not in TASKS:
        raise ConfigError(
            f"There is no task {name!r}. The tasks are {', '.join(sorted(TASKS))}. See: "
            "paligemma eval --list"
        )
    return TASKS[name]


_SCIENCE = "Question: {question}\nContext: {hint}\nOptions: {options}\nAnswer:"
_CHOOSE = "answer en  {question} choose from: {choices}"  # both spaces and the tabs are its own
_RSVQA: dict[str, Any] = dict(
    source="Lobry et al. 2020", columns={"answer": "answers", "type": "question_type"}
)
_PAIR = {"question": "sentence", "answer": "label"}
_CAPTION: dict[str, Any] = dict(prompt="caption en", answers="captions")
_TEXTS: dict[str, Any] = dict(**_CAPTION, columns={"captions": "texts"})
_VIDEO: dict[str, Any] = dict(final="train+valid", validation="valid", text_length=64)
_SEGMENT: dict[str, Any] = dict(prompt="segment {expression}", answers="mask")

TASKS: dict[str, Task] = {task.name: task for task in (
    # Questions that several people answered.
    Task("vqav2", "VQAv2", "Goyal et al. 2017", answers="answers",
         columns={"question": "question_text"}, directories="vqa/3.0.0",
         train="train+validation[:-10240]", final="train+validation",
         validation="validation[-10240:]"),
    Task("textvqa", "TextVQA", "Singh et al. 2019", answers="answers",
         directories="text_vqa/1.0.1"),
    Task("okvqa", "OKVQA", "Marino et al. 2019", answers="answers", directories="ok_vqa/1.0.0",
         train="train[:-10%]", final="train", validation="train[-10%:]"),
    Task("aokvqa_da", "A-OKVQA, direct answer", "Schwenk et al. 2022", answers="answers",
         columns={"answers": "direct_answers"}, directories="a_ok_vqa/1.0.0"),
    Task("vizwizvqa", "VizWiz VQA", "Gurari et al. 2018", answers="answers",
         directories="viz_wiz_vqa/1.0.0", text_length=48),
    # Questions with one answer.
    Task("aokvqa_mc", "A-OKVQA, multiple choice", "Schwenk et al. 2022", _CHOOSE,
         columns={"choices": "multiple_choice_possible_answers",
                  "answer": "multiple_choice_correct_idx"},
         directories="a_ok_vqa/1.0.0", text_length=128),
    Task("ai2d", "AI2D", "Kembhavi et al. 2016", _CHOOSE, columns={"choices": "possible_answers"},
         directories="ai2d/1.1.0", train="train[:-1024]", final="train",
         validation="train[-1024:]", text_length=128),
    Task("gqa", "GQA", "Hudson and Manning 2019", directories="gqa/1.0.0", train="train_balanced",
         final="train_balanced+val_balanced", validation="val_balanced"),
    Task("xgqa", "xGQA", "Pfeiffer et al. 2022"),
    # No public builder; columns and splits are those that big_vision's configurations name.
    Task("nlvr2", "NLVR2", "Suhr et al. 2019", columns=_PAIR, directories="nlvr2",
         final="train+dev", validation="dev", text_length=64),
    Task("marvl", "MaRVL", "Liu et al. 2021", columns=_PAIR),
    Task("ocrvqa", "OCR-VQA", "Mishra et al. 2019", directories="ocrvqa_id",
         train="train+val[20000:]", validation="val[:20000]"),
    Task("science_qa", "ScienceQA", "Lu et al. 2022", _SCIENCE, directories="science_qa/1.0.0",
         text_length=512),
    Task("rsvqa_lr", "RSVQA, low resolution", directories="rsvqa_lr/nonum/1.0.2", **_RSVQA),
    Task("rsvqa_hr", "RSVQA, high resolution", directories="rsvqa_hr/nonum/1.0.2", **_RSVQA),
    Task("chartqa", "ChartQA", "Masry et al. 2022", "{question}", text_length=48,
         directories="chart_qa/human/1.0.0 chart_qa/augmented/1.0.0"),
    Task("docvqa", "DocVQA", "Mathew et al. 2021", "{question}", answers="answers",
         directories="doc_vqa/1.0.0", train="train[:-5%]", validation="train[-5%:]"),
    Task("infovqa", "InfographicVQA", "Mathew et al. 2022", answers="answers",
         directories="infovqa/1.1.0", text_length=48),
    Task("stvqa", "ST-VQA", "Biten et al. 2019", answers="answers", directories="stvqa/1.2.0",
         text_length=48),
    Task("tallyqa", "TallyQA", "Acharya et al. 2019", directories="tally_qa/1.0.0", final="train",
         validation="train[:5%]"),
    Task("countbenchqa", "CountBenchQA", "Paiss et al. 2023; Beyer et al. 2024",
         columns={"answer": "number"}),
    # big_vision's configuration asks the bare question; the published numbers were asked like this.
    Task("pope", "POPE", "Li et al. 2023", train="test", final="test", validation="test",
         directories="pope/pope_random/1.0.0 pope/pope_popular/1.0.0 pope/pope_adversarial/1.0.0",
         text_length=48),
    Task("mmvp", "MMVP", "Tong et al. 2024"),
    # Captions.
    Task("cococap", "COCO captions", "Chen et al. 2015", **_CAPTION,
         columns={"captions": "captions.text"}, directories="coco_captions/2014/1.1.0",
         train="train[:98%]+restval", final="train+restval"),
    Task("nocaps", "NoCaps", "Agrawal et al. 2019", **_TEXTS),
    Task("textcaps", "TextCaps", "Sidorov et al. 2020", **_TEXTS, directories="text_caps/1.0.0",
         train="train[:98%]", final="train"),
    Task("scicap", "SciCap", "Hsu et al. 2021", **_CAPTION, text_length=96,
         columns={"captions": "caption/lowercase_and_token_and_remove_figure_index"},
         directories="scicap/first_sentence_subfig_no/1.0.0"),
    Task("screen2words", "Screen2Words", "Wang et al. 2021", **_CAPTION,
         columns={"captions": "summary"}, directories="screen2_words/1.0.0", final="train+dev",
         validation="dev", text_length=24),
    Task("widgetcap", "Widget Captioning", "Li et al. 2020", **_TEXTS,
         directories="widgetcap/1.0.0", final="train+dev", validation="dev"),
    Task("xm3600", "Crossmodal-3600", "Thapliyal et al. 2022", "caption {language}", "captions"),
    Task("coco35l", "COCO-35L", "Thapliyal et al. 2022", "caption {language}", "captions",
         directories="coco35l/1.0.0", train="train_en", final="train_en", validation="dev_en"),
    Task("longcap100", "100 long captions", "big_vision", **_CAPTION,
         columns={"captions": "suffix"}, directories="longcap100", train="data_train90",
         final="data_train90", validation="data_val10", text_length=128),
    # Videos, as several images: 16 frames (MSVD 8). big_vision's reader was not released.
    Task("msvd_qa", "MSVD-QA", "Xu et al. 2017", directories="msvd_qa", **_VIDEO),
    Task("msrvtt_qa", "MSRVTT-QA", "Xu et al. 2017", directories="msrvtt_qa", **_VIDEO),
    Task("activitynet_qa", "ActivityNet-QA", "Yu et al. 2019", directories="activitynet_qa",
         **_VIDEO),
    Task("msrvtt_cap", "MSR-VTT captions", "Xu et al. 2016", directories="msrvtt",
         **_CAPTION, **{**_VIDEO, "text_length": 32}),
    Task("activitynet_cap", "ActivityNet captions", "Krishna et al. 2017",
         directories="activitynet_captions_mr", **_CAPTION, **_VIDEO),
    Task("vatex_cap", "VATEX", "Wang et al. 2019", directories="vatex", **_CAPTION, **_VIDEO),
    # Objects and text. Models fine-tuned for RefCOCO are asked for the expression alone.
    Task("refcoco_seg", "RefCOCO segmentation", "Yu et al. 2016", **_SEGMENT,
         directories="ref_coco_bv/refcocox_combined/1.4.0", final="train",
         validation="validation", text_length=48),
    Task("refcocoplus_seg", "RefCOCO+ segmentation", "Yu et al. 2016", **_SEGMENT),
    Task("refcocog_seg", "RefCOCOg segmentation", "Mao et al. 2016", **_SEGMENT),
    Task("detection", "Detection, COCO protocol", "Lin et al. 2014", "detect {labels}", "objects"),
    Task("ocr", "Text recognition", "Roboflow's focused scene OCR", "ocr", "text"),
)}  # fmt: skip
