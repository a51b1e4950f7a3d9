"""Metrics as plain functions on lists, and as accumulators that merge across processes.

    from paligemma_jax.evaluation import metrics

    metrics.exact_match(["a cat"], ["a cat"])                      # {"acc": 1.0, "num": 1.0, ...}
    metrics.anls({"q1": "42 %"}, {"q1": ["42%", "42 percent"]})    # paired by id

    metric = metrics.CIDEr()
    metric.add("picture 1", "a red car", ["a car", "one red car"])
    metric.merge(of_another_process)
    metric.result(), metrics.bootstrap(metric)["cider"]

What does not fit raises one DatasetError that lists all of it. numpy is all that is needed: nothing
here imports JAX.
"""

from paligemma_jax.evaluation.metrics.accumulator import Accumulator as Accumulator
from paligemma_jax.evaluation.metrics.all_point_precision import (
    AllPointPrecision as AllPointPrecision,
)
from paligemma_jax.evaluation.metrics.anls import ANLS as ANLS
from paligemma_jax.evaluation.metrics.anls import anls as anls
from paligemma_jax.evaluation.metrics.anls import anls_score as anls_score
from paligemma_jax.evaluation.metrics.bleu import BLEU as BLEU
from paligemma_jax.evaluation.metrics.bleu import bleu as bleu
from paligemma_jax.evaluation.metrics.bootstrap import Interval as Interval
from paligemma_jax.evaluation.metrics.bootstrap import bootstrap as bootstrap
from paligemma_jax.evaluation.metrics.by_figure import ByFigure as ByFigure
from paligemma_jax.evaluation.metrics.by_figure import OfFigure as OfFigure
from paligemma_jax.evaluation.metrics.by_group import ByGroup as ByGroup
from paligemma_jax.evaluation.metrics.by_group import Grouped as Grouped
from paligemma_jax.evaluation.metrics.cider import CIDEr as CIDEr
from paligemma_jax.evaluation.metrics.cider import cider as cider
from paligemma_jax.evaluation.metrics.coco_detection import BoxDetection as BoxDetection
from paligemma_jax.evaluation.metrics.coco_detection import FoundBoxes as FoundBoxes
from paligemma_jax.evaluation.metrics.coco_detection import TrueBoxes as TrueBoxes
from paligemma_jax.evaluation.metrics.coco_detection import box_detection as box_detection
from paligemma_jax.evaluation.metrics.counting import CountAccuracy as CountAccuracy
from paligemma_jax.evaluation.metrics.counting import count_accuracy as count_accuracy
from paligemma_jax.evaluation.metrics.counting import read_count as read_count
from paligemma_jax.evaluation.metrics.edit_distance import indel_similarity as indel_similarity
from paligemma_jax.evaluation.metrics.edit_distance import levenshtein as levenshtein
from paligemma_jax.evaluation.metrics.edit_distance import (
    normalized_distance as normalized_distance,
)
from paligemma_jax.evaluation.metrics.exact_match import ExactMatch as ExactMatch
from paligemma_jax.evaluation.metrics.exact_match import exact_match as exact_match
from paligemma_jax.evaluation.metrics.mask_pairs import MaskPairs as MaskPairs
from paligemma_jax.evaluation.metrics.mask_pairs import paired_overlaps as paired_overlaps
from paligemma_jax.evaluation.metrics.meteor import Meteor as Meteor
from paligemma_jax.evaluation.metrics.meteor import meteor as meteor
from paligemma_jax.evaluation.metrics.options import Choice as Choice
from paligemma_jax.evaluation.metrics.options import ChoiceAccuracy as ChoiceAccuracy
from paligemma_jax.evaluation.metrics.options import OptionLetterAccuracy as OptionLetterAccuracy
from paligemma_jax.evaluation.metrics.options import choice_accuracy as choice_accuracy
from paligemma_jax.evaluation.metrics.options import (
    option_letter_accuracy as option_letter_accuracy,
)
from paligemma_jax.evaluation.metrics.paired import OfPair as OfPair
from paligemma_jax.evaluation.metrics.paired import PairedAccuracy as PairedAccuracy
from paligemma_jax.evaluation.metrics.paired import paired_accuracy as paired_accuracy
from paligemma_jax.evaluation.metrics.pairing import by_id as by_id
from paligemma_jax.evaluation.metrics.perplexity import Perplexity as Perplexity
from paligemma_jax.evaluation.metrics.perplexity import perplexity as perplexity
from paligemma_jax.evaluation.metrics.ptb_tokenizer import tokenize as tokenize
from paligemma_jax.evaluation.metrics.reading import Reading as Reading
from paligemma_jax.evaluation.metrics.reading import reading as reading
from paligemma_jax.evaluation.metrics.referring_segmentation import ObjectMask as ObjectMask
from paligemma_jax.evaluation.metrics.referring_segmentation import (
    ReferringSegmentation as ReferringSegmentation,
)
from paligemma_jax.evaluation.metrics.referring_segmentation import (
    referring_segmentation as referring_segmentation,
)
from paligemma_jax.evaluation.metrics.relaxed_accuracy import RelaxedAccuracy as RelaxedAccuracy
from paligemma_jax.evaluation.metrics.relaxed_accuracy import relaxed_accuracy as relaxed_accuracy
from paligemma_jax.evaluation.metrics.rouge_l import RougeL as RougeL
from paligemma_jax.evaluation.metrics.rouge_l import rouge_l as rouge_l
from paligemma_jax.evaluation.metrics.tasks import TASKS as TASKS
from paligemma_jax.evaluation.metrics.tasks import Measured as Measured
from paligemma_jax.evaluation.metrics.tasks import metric_for as metric_for
from paligemma_jax.evaluation.metrics.together import Together as Together
from paligemma_jax.evaluation.metrics.totals import MeanAccumulator as MeanAccumulator
from paligemma_jax.evaluation.metrics.vqa_accuracy import SimpleVQAAccuracy as SimpleVQAAccuracy
from paligemma_jax.evaluation.metrics.vqa_accuracy import VQAv2Accuracy as VQAv2Accuracy
from paligemma_jax.evaluation.metrics.vqa_accuracy import simple_vqa as simple_vqa
from paligemma_jax.evaluation.metrics.vqa_accuracy import vqa_v2 as vqa_v2
from paligemma_jax.evaluation.metrics.yes_no import YesNo as YesNo
from paligemma_jax.evaluation.metrics.yes_no import yes_no as yes_no
