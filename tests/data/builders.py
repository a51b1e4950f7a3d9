"""What each public builder prepares: columns and splits, a row of it, and what is trained from it.

Columns and splits from big_vision's datasets/ and tensorflow-datasets' coco_captions; prompts and
answers from big_vision's configs/proj/paligemma/transfers. Kinds of columns: text, texts, int,
bool, float, image, box, bools10, a tuple (names of a class label), a list of that (a sequence of
them), a dict (a sequence of such).
"""

import dataclasses
from typing import Any

PERSONS = ["a cup", "cup", "cup", "cup", "mug", "cup", "cup", "cup", "cup", "A cup"]
KNOWN = ("no", "maybe", "yes")


@dataclasses.dataclass(frozen=True)
class Built:
    """A data set.

    Attributes:
      columns: of the builder.
      splits: of the builder, those that no row names left out.
      row: values of the columns that are read; the others hold anything.
      prefix: what it is asked with.
      answers: all answers, in their order.
      trained: what they become, if not the same.
      directories: of tfds, below the place of its data.
    """

    columns: dict[str, Any]
    splits: str
    row: dict[str, Any]
    prefix: str
    answers: list[str]
    directories: str
    trained: list[str] | None = None


_A_OK_VQA: dict[str, Any] = dict(
    columns={
        "image": "image", "image_id": "int", "direct_answers": "texts",
        "direct_answer_is_difficult": "bool", "multiple_choice_possible_answers": "texts",
        "multiple_choice_correct_idx": "int", "answer_rationales": "texts", "question": "text",
        "question_id": "text",
    },
    splits="train val test",
    directories="a_ok_vqa/1.0.0",
)  # fmt: skip
_RSVQA: dict[str, Any] = dict(
    columns={
        "question_id": "int", "filename": "text", "image": "image", "question": "text",
        "question_type": "text", "answers": "texts", "raw_answers": "texts",
    },
    row={"question": "Is there a road?", "answers": ["Yes"]},
    prefix="answer en Is there a road?",
    answers=["Yes"],
    trained=["yes"],
)  # fmt: skip
_DOCUMENTS = {"question_id": "int", "image/filename": "text", "image": "image", "question": "text"}
_SCENE_TEXT: dict[str, Any] = dict(
    columns={
        "question_id": "int", "filename": "text", "image": "image", "question": "text",
        "answers": "texts",
    },
    splits="train val test",
    row={"question": "What is written? ", "answers": ["STOP", "Stop sign"]},
    prefix="answer en What is written? ",
    answers=["STOP", "Stop sign"],
    trained=["stop", "stop sign"],
)  # fmt: skip

BUILT = {
    "ai2d": Built(
        {
            "id": "text", "question": "text", "label": "int", "answer": "text",
            "possible_answers": "texts", "abc_label": "bool", "image_name": "text",
            "image": "image",
        },
        "train test",
        {"question": "Who eats?", "possible_answers": ["Owl", "a Fox"], "answer": "a Fox"},
        "answer en  Who eats? choose from: Owl \t a Fox", ["a Fox"],
        "ai2d/1.1.0",
    ),
    "aokvqa_da": Built(
        **_A_OK_VQA, row={"question": "What is it?", "direct_answers": PERSONS},
        prefix="answer en What is it?", answers=PERSONS,
    ),
    "aokvqa_mc": Built(
        **_A_OK_VQA,
        row={"question": "What is it?", "multiple_choice_correct_idx": 2,
             "multiple_choice_possible_answers": ["cat", "dog", "cup", "hat"]},
        prefix="answer en  What is it? choose from: cat \t dog \t cup \t hat", answers=["cup"],
    ),
    "chartqa": Built(
        _DOCUMENTS | {"answer": "text"}, "train val test",
        {"question": "How many?", "answer": "12 %"}, "How many?", ["12 %"],
        "chart_qa/human/1.0.0 chart_qa/augmented/1.0.0",
    ),
    "coco35l": Built(
        {"image/id": "text", "image": "image", "captions": "texts", "language": "text"},
        "train_en dev_en train_de",
        {"captions": ["a cup .", "the cup ."], "language": "en"}, "caption en",
        ["a cup .", "the cup ."], "coco35l/1.0.0",
    ),
    "cococap": Built(
        {
            "image": "image", "image/filename": "text", "image/id": "int",
            "objects": {"area": "int", "bbox": "box", "id": "int", "is_crowd": "bool",
                        "label": ("person", "cup")},
            "captions": {"text": "text", "id": "int"},
        },
        "train val test restval",
        {"captions": [{"text": "A cup.", "id": 1}, {"text": "The Cup", "id": 2}]}, "caption en",
        ["A cup.", "The Cup"], "coco_captions/2014/1.1.0",
    ),
    "docvqa": Built(
        _DOCUMENTS | {"answers": "texts"}, "train val test",
        {"question": "Which date?", "answers": ["May 2", "2 May"]}, "Which date?",
        ["May 2", "2 May"], "doc_vqa/1.0.0",
    ),
    "gqa": Built(
        {
            "example_id": "int", "image/id": "text", "image": "image", "question": "text",
            "answer": "text", "full_answer": "text", "is_balanced": "bool",
        },
        "train_balanced val_balanced testdev_balanced",
        {"question": "Is it red?", "answer": "yes"}, "answer en Is it red?", ["yes"], "gqa/1.0.0",
    ),
    "infovqa": Built(**_SCENE_TEXT, directories="infovqa/1.1.0"),
    "stvqa": Built(**_SCENE_TEXT, directories="stvqa/1.2.0"),
    "okvqa": Built(
        {
            "image": "image", "image_id": "int", "answer_type": "text", "answers": "texts",
            "answers_confidence": "bools10", "answers_raw": "texts", "question_id": "int",
            "question_type": "text", "question_type_readable": "text", "question": "text",
        },
        "train val",
        {"question": "Which brand?", "answers": PERSONS}, "answer en Which brand?", PERSONS,
        "ok_vqa/1.0.0",
    ),
    "pope": Built(
        _DOCUMENTS | {"answer": "text", "thing": "text"}, "test",
        {"question": "Is there a cup in the image?", "answer": "no"},
        "answer en Is there a cup in the image?", ["no"],
        "pope/pope_random/1.0.0 pope/pope_popular/1.0.0 pope/pope_adversarial/1.0.0",
    ),
    "rsvqa_hr": Built(
        **_RSVQA, splits="train val test test_2", directories="rsvqa_hr/nonum/1.0.2"
    ),
    "rsvqa_lr": Built(**_RSVQA, splits="train val test", directories="rsvqa_lr/nonum/1.0.2"),
    "scicap": Built(
        {
            "image/id": "text", "image/filename": "text", "image": "image",
            "caption/originally_extracted": "text",
            "caption/lowercase_and_token_and_remove_figure_index": "text",
            "caption/normalized/basic_num": "text",
            "caption/normalized/advanced_equation_bracket": "text",
        },
        "train val test",
        {"caption/lowercase_and_token_and_remove_figure_index": "loss of 2 runs ."},
        "caption en", ["loss of 2 runs ."], "scicap/first_sentence_subfig_no/1.0.0",
    ),
    "science_qa": Built(
        {
            "question": "text", "choices": "texts", "answer": "int", "hint": "text",
            "task": "text", "grade": "text", "subject": "text", "topic": "text",
            "category": "text", "skill": "text", "lecture": "text", "solution": "text",
            "image": "image", "indexed_choices": "text", "indexed_answer": "text",
        },
        "train val test",
        {"question": "Which?", "choices": ["a cup", "a cat"], "answer": 1, "hint": "N/A"},
        "Question: Which?\nContext: N/A\nOptions: (A) a cup, (B) a cat\nAnswer:",
        ["The answer is B."], "science_qa/1.0.0", ["The answer is A.", "The answer is B."],
    ),
    "screen2words": Built(
        {"image/id": "int", "image/filename": "text", "image": "image", "summary": "texts"},
        "train dev test",
        {"summary": ["a Page", "page of b"]}, "caption en", ["a Page", "page of b"],
        "screen2_words/1.0.0",
    ),
    "tallyqa": Built(
        {
            "image": "image", "image_id": "int", "image_source": "text", "question": "text",
            "question_id": "int", "answer": "int", "issimple": "int",
        },
        "train test",
        {"question": "How many?", "answer": 3}, "answer en How many?", ["3"], "tally_qa/1.0.0",
    ),
    "textcaps": Built(
        {"image/id": "text", "image_filepath": "text", "image": "image", "texts": "texts"},
        "train val test",
        {"texts": ["A sign: STOP", "Stop"]}, "caption en", ["A sign: STOP", "Stop"],
        "text_caps/1.0.0", ["a sign: stop", "stop"],
    ),
    "textvqa": Built(
        {
            "image/id": "int", "image_filepath": "text", "image": "image", "question_id": "int",
            "question": "text", "answers": "texts",
        },
        "train val test",
        {"question": "which brand?", "answers": PERSONS}, "answer en which brand?", PERSONS,
        "text_vqa/1.0.1",
    ),
    "vizwizvqa": Built(
        {
            "question": "text", "image/filename": "text", "image": "image", "answers": "texts",
            "answer_confidences": "texts", "answerable": "int", "question_id": "int",
        },
        "train val test",
        {"question": "What is this?", "answers": PERSONS[:9]}, "answer en What is this?",
        PERSONS[:9], "viz_wiz_vqa/1.0.0",
    ),
    "vqav2": Built(
        {
            "image/id": "int", "image/filename": "text", "image": "image", "question_id": "int",
            "question_type": "text", "question_text": "text", "answer_type": "text",
            "answers": "texts", "answer_confidences": [KNOWN], "top_answer": "text",
        },
        "train validation test test-dev",
        {"question_text": "What is it?", "answers": PERSONS, "answer_confidences": ["yes"] * 10},
        "answer en What is it?", PERSONS, "vqa/3.0.0",
    ),
    "widgetcap": Built(
        {
            "image/id": "text", "image/filename": "text", "image": "image", "texts": "texts",
            "bbox": "box", "screen_id": "text", "node_id": "text", "height": "int",
            "width": "int",
        },
        "train dev test",
        {"texts": ["go back", "Back"]}, "caption en", ["go back", "Back"], "widgetcap/1.0.0",
    ),
    "refcoco_seg": Built(
        {
            "id": "int", "image": "image", "height": "int", "width": "int",
            "license": ("Attribution License", "none"), "file_name": "text", "flickr_url": "text",
            "coco_url": "text",
            "objects": {
                "id": "int", "area": "float", "bbox": "box", "mask": "image",
                "category": ("person", "cup"), "supercategory": ("person", "kitchen"),
                "iscrowd": "bool", "refs": {"id": "int", "sentence": "text"},
            },
        },
        "train validation test train_flat",
        {"objects": [{"refs": [{"id": 1, "sentence": "left Cup"}]}]}, "left Cup",
        ["<loc0256><loc0102><loc0767><loc0409>" + "<seg007>" * 16],
        "ref_coco_bv/refcocox_combined/1.4.0",
    ),
}  # fmt: skip
