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

from paligemma_jax.evaluation.answer_metrics import ANLS as ANLS
from paligemma_jax.evaluation.answer_metrics import Choice as Choice
from paligemma_jax.evaluation.answer_metrics import ChoiceAccuracy as ChoiceAccuracy
from paligemma_jax.evaluation.answer_metrics import CountAccuracy as CountAccuracy
from paligemma_jax.evaluation.answer_metrics import ExactMatch as ExactMatch
from paligemma_jax.evaluation.answer_metrics import OfPair as OfPair
from paligemma_jax.evaluation.answer_metrics import OptionLetterAccuracy as OptionLetterAccuracy
from paligemma_jax.evaluation.answer_metrics import PairedAccuracy as PairedAccuracy
from paligemma_jax.evaluation.answer_metrics import Perplexity as Perplexity
from paligemma_jax.evaluation.answer_metrics import Reading as Reading
from paligemma_jax.evaluation.answer_metrics import RelaxedAccuracy as RelaxedAccuracy
from paligemma_jax.evaluation.answer_metrics import SimpleVQAAccuracy as SimpleVQAAccuracy
from paligemma_jax.evaluation.answer_metrics import VQAv2Accuracy as VQAv2Accuracy
from paligemma_jax.evaluation.answer_metrics import YesNo as YesNo
from paligemma_jax.evaluation.answer_metrics import anls as anls
from paligemma_jax.evaluation.answer_metrics import anls_score as anls_score
from paligemma_jax.evaluation.answer_metrics import choice_accuracy as choice_accuracy
from paligemma_jax.evaluation.answer_metrics import count_accuracy as count_accuracy
from paligemma_jax.evaluation.answer_metrics import exact_match as exact_match
from paligemma_jax.evaluation.answer_metrics import indel_similarity as indel_similarity
from paligemma_jax.evaluation.answer_metrics import levenshtein as levenshtein
from paligemma_jax.evaluation.answer_metrics import normalized_distance as normalized_distance
from paligemma_jax.evaluation.answer_metrics import option_letter_accuracy as option_letter_accuracy
from paligemma_jax.evaluation.answer_metrics import paired_accuracy as paired_accuracy
from paligemma_jax.evaluation.answer_metrics import perplexity as perplexity
from paligemma_jax.evaluation.answer_metrics import read_count as read_count
from paligemma_jax.evaluation.answer_metrics import reading as reading
from paligemma_jax.evaluation.answer_metrics import relaxed_accuracy as relaxed_accuracy
from paligemma_jax.evaluation.answer_metrics import simple_vqa as simple_vqa
from paligemma_jax.evaluation.answer_metrics import vqa_v2 as vqa_v2
from paligemma_jax.evaluation.answer_metrics import yes_no as yes_no
from paligemma_jax.evaluation.caption_metrics import BLEU as BLEU
from paligemma_jax.evaluation.caption_metrics import CIDEr as CIDEr
from paligemma_jax.evaluation.caption_metrics import Meteor as Meteor
from paligemma_jax.evaluation.caption_metrics import RougeL as RougeL
from paligemma_jax.evaluation.caption_metrics import bleu as bleu
from paligemma_jax.evaluation.caption_metrics import cider as cider
from paligemma_jax.evaluation.caption_metrics import meteor as meteor
from paligemma_jax.evaluation.caption_metrics import rouge_l as rouge_l
from paligemma_jax.evaluation.caption_metrics import tokenize as tokenize
from paligemma_jax.evaluation.detection_metrics import AllPointPrecision as AllPointPrecision
from paligemma_jax.evaluation.detection_metrics import BoxDetection as BoxDetection
from paligemma_jax.evaluation.detection_metrics import FoundBoxes as FoundBoxes
from paligemma_jax.evaluation.detection_metrics import MaskPairs as MaskPairs
from paligemma_jax.evaluation.detection_metrics import ObjectMask as ObjectMask
from paligemma_jax.evaluation.detection_metrics import (
    ReferringSegmentation as ReferringSegmentation,
)
from paligemma_jax.evaluation.detection_metrics import TrueBoxes as TrueBoxes
from paligemma_jax.evaluation.detection_metrics import box_detection as box_detection
from paligemma_jax.evaluation.detection_metrics import paired_overlaps as paired_overlaps
from paligemma_jax.evaluation.detection_metrics import (
    referring_segmentation as referring_segmentation,
)
from paligemma_jax.evaluation.metric import Accumulator as Accumulator
from paligemma_jax.evaluation.metric import ByFigure as ByFigure
from paligemma_jax.evaluation.metric import ByGroup as ByGroup
from paligemma_jax.evaluation.metric import Grouped as Grouped
from paligemma_jax.evaluation.metric import Interval as Interval
from paligemma_jax.evaluation.metric import MeanAccumulator as MeanAccumulator
from paligemma_jax.evaluation.metric import OfFigure as OfFigure
from paligemma_jax.evaluation.metric import Together as Together
from paligemma_jax.evaluation.metric import bootstrap as bootstrap
from paligemma_jax.evaluation.metric import by_id as by_id
