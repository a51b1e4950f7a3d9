"""Every benchmark, by name."""

from collections.abc import Iterable
from typing import Any

from paligemma_jax.errors import ConfigError
from paligemma_jax.evaluation.benchmarks.benchmark import Answer, Benchmark
from paligemma_jax.evaluation.benchmarks.fields import (
    choice,
    choice_prompt,
    detect_prompt,
    field,
    grouped,
    of_pair,
    science_prompt,
    template,
)
from paligemma_jax.evaluation.benchmarks.objects import true_boxes
from paligemma_jax.evaluation.benchmarks.published import PUBLISHED

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


def _captions(name: str, title: str, source: str, **rest: Any) -> Benchmark:
    example = {"id": "17", "image": "17.jpg", "captions": ["a cup on a table", "a white cup"]}
    settings = {"prompt": template("caption en"), "reference": field("captions")} | rest
    return _benchmark(name, title, source, **({"example": example} | settings))


def _languages(name: str, title: str, source: str) -> Benchmark:
    example = {"id": "17 de", "image": "17.jpg", "language": "de", "captions": ["eine Tasse"]}
    reference = grouped("language", field("captions"))
    prompt = template("caption {language}")
    return _captions(
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
    return _captions(name, title, source, example=example, max_new_tokens=64, notes=_VIDEO_NOTE)


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
    yield _captions("cococap", "COCO captions", "Chen et al. 2015", beams=2)
    yield _captions("nocaps", "NoCaps", "Agrawal et al. 2019", beams=2,
                    notes="Published: a model fine-tuned for COCO captions.")  # fmt: skip
    yield _captions("textcaps", "TextCaps", "Sidorov et al. 2020", beams=3)
    yield _captions("scicap", "SciCap", "Hsu et al. 2021", max_new_tokens=96)
    yield _captions("screen2words", "Screen2Words", "Wang et al. 2021", max_new_tokens=24)
    yield _captions("widgetcap", "Widget Captioning", "Li et al. 2020",
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
