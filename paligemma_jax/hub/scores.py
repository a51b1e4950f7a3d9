"""What the fine-tuned models were published for, and with which score.

Scores: big_vision's README (PaliGemma, arXiv 2407.07726) and the model cards of the DOCCI ones
(PaliGemma 2, arXiv 2412.03555). The model cards' own words for tasks are not repeated here.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Score:
    """A published result; `values` has one number for each part that `metric` names."""

    metric: str
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.metric} {' / '.join(f'{value:g}' for value in self.values)}"


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model was fine-tuned for; `scores` by resolution in pixels."""

    use: str
    metric: str
    scores: Mapping[int, tuple[float, ...]]

    def score(self, resolution: int) -> Score | None:
        """What was published at this resolution, if anything was."""
        values = self.scores.get(resolution)
        return None if values is None else Score(self.metric, values)


def _at(*scores: float | tuple[float, ...]) -> dict[int, tuple[float, ...]]:
    """Scores at 224, 448 and, where there are three, 896 pixels."""
    each = (score if isinstance(score, tuple) else (score,) for score in scores)
    return dict(zip((224, 448, 896), each, strict=False))


TASKS: dict[str, Task] = {
    "ai2d": Task("questions about science diagrams", "accuracy", _at(72.12, 73.28)),
    "aokvqa-da": Task(
        "questions that need knowledge, answered freely", "accuracy", _at(61.85, 63.22)
    ),
    "aokvqa-mc": Task("questions that need knowledge, with choices", "accuracy", _at(76.37, 76.90)),
    "coco35l": Task(
        "captions in 35 languages",
        "CIDEr en / avg-34 / avg",
        _at((139.2, 115.8, 116.4), (141.2, 118.0, 118.6)),
    ),
    "cococap": Task("captions", "CIDEr", _at(141.92, 144.60)),
    "docvqa": Task("questions about documents", "ANLS", _at(43.74, 78.02, 84.77)),
    "gqa": Task("questions about scenes and relations", "accuracy", _at(65.61, 67.03)),
    "infovqa": Task("questions about infographics", "ANLS", _at(28.46, 40.47, 47.75)),
    "nlvr2": Task("is a sentence true of two pictures", "accuracy", _at(90.02, 88.93)),
    "ocrvqa": Task("questions about book covers", "accuracy", _at(73.24, 75.60, 75.90)),
    "okvqa": Task("questions that need knowledge", "accuracy", _at(63.54, 63.15)),
    "refcoco-seg": Task(
        "masks of what is described",
        "mIoU refcoco / + / g",
        _at((73.40, 68.32, 67.65), (75.57, 69.76, 70.17), (76.94, 72.18, 72.22)),
    ),
    "rsvqa-hr": Task(
        "questions about aerial pictures, fine",
        "accuracy test / test2",
        _at((92.61, 90.58), (92.79, 90.54)),
    ),
    "rsvqa-lr": Task("questions about aerial pictures, coarse", "accuracy", _at(92.65, 93.11)),
    "scicap": Task(
        "captions of scientific figures", "CIDEr / BLEU-4", _at((162.25, 0.192), (181.49, 0.211))
    ),
    "science-qa": Task("science questions with choices", "accuracy", _at(95.39, 95.93)),
    "screen2words": Task("summaries of phone screens", "CIDEr", _at(117.57, 119.59)),
    "stvqa": Task("questions about text in scenes", "ANLS", _at(63.29, 81.82, 84.40)),
    "tallyqa": Task("counting", "accuracy simple / complex", _at((81.72, 69.56), (84.86, 72.27))),
    "textcaps": Task("captions that read the text", "CIDEr", _at(127.48, 153.94)),
    "textvqa": Task("questions about text in pictures", "accuracy", _at(55.47, 73.15, 76.48)),
    "vizwizvqa": Task("questions of blind people", "accuracy", _at(73.7, 75.52)),
    "vqav2": Task("questions about photos", "accuracy test-std", _at(83.19, 85.64)),
    "widgetcap": Task("captions of parts of screens", "CIDEr", _at(136.07, 148.36)),
}

DOCCI_USE = "long, detailed descriptions"
# Sentences that the picture does not entail: fewer are better.
DOCCI = {
    "3b": Score("NES (lower is better)", (28.4,)),
    "10b": Score("NES (lower is better)", (20.3,)),
}
