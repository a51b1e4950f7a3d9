"""Which metric each published task is measured with."""

import dataclasses
from collections.abc import Callable

from paligemma_jax.errors import ConfigError
from paligemma_jax.evaluation.metrics.accumulator import Accumulator
from paligemma_jax.evaluation.metrics.anls import ANLS
from paligemma_jax.evaluation.metrics.bleu import BLEU
from paligemma_jax.evaluation.metrics.by_group import ByGroup
from paligemma_jax.evaluation.metrics.cider import CIDEr
from paligemma_jax.evaluation.metrics.coco_detection import BoxDetection
from paligemma_jax.evaluation.metrics.counting import CountAccuracy
from paligemma_jax.evaluation.metrics.exact_match import ExactMatch
from paligemma_jax.evaluation.metrics.meteor import Meteor
from paligemma_jax.evaluation.metrics.options import ChoiceAccuracy, OptionLetterAccuracy
from paligemma_jax.evaluation.metrics.paired import PairedAccuracy
from paligemma_jax.evaluation.metrics.perplexity import Perplexity
from paligemma_jax.evaluation.metrics.reading import Reading
from paligemma_jax.evaluation.metrics.referring_segmentation import ReferringSegmentation
from paligemma_jax.evaluation.metrics.relaxed_accuracy import RelaxedAccuracy
from paligemma_jax.evaluation.metrics.rouge_l import RougeL
from paligemma_jax.evaluation.metrics.together import Together
from paligemma_jax.evaluation.metrics.vqa_accuracy import SimpleVQAAccuracy, VQAv2Accuracy
from paligemma_jax.evaluation.metrics.yes_no import YesNo


@dataclasses.dataclass(frozen=True)
class Measured:
    """How a task is measured: `make()` gives an empty metric, `main` names the published figure."""

    make: Callable[[], Accumulator]
    main: str


def _mean_over_groups(metric: Accumulator, overall: bool = True) -> ByGroup:
    return ByGroup(metric, {"mean": None}, overall)


def _captions() -> Accumulator:
    return Together(CIDEr(), BLEU(), RougeL(), Meteor())


_XGQA = ("bn", "de", "id", "ko", "pt", "ru", "zh")
_XM3600_OTHERS = tuple(
    "ar bn cs da de el es fa fi fil fr he hi hr hu id it ja ko mi nl no pl pt quz ro ru sv sw te "
    "th tr uk vi zh".split()
)  # fmt: skip
_COCO35L_OTHERS = tuple(code for code in _XM3600_OTHERS if code != "quz")

_CAPTIONS = Measured(_captions, "cider")
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
