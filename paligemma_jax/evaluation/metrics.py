"""Metrics as plain functions on lists, and as accumulators that merge across processes.

    from paligemma_jax.evaluation import metrics

    metrics.exact_match(["a cat"], ["a cat"])                      # {"acc": 1.0, "num": 1.0, ...}
    metrics.anls({"q1": "42 %"}, {"q1": ["42%", "42 percent"]})    # paired by id

    metric = metrics.CIDEr()
    metric.add("image 1", "a red car", ["a car", "one red car"])
    metric.merge(of_another_process)
    metric.result(), metrics.bootstrap(metric)["cider"]

Scores per group, such as a language: metric.add(id, prediction, reference, group="de"). Invalid
examples raise one DatasetError that lists all of them. NumPy is all that is needed: nothing here
imports JAX.
"""

from paligemma_jax.evaluation.answer_metrics import Choice as Choice
from paligemma_jax.evaluation.answer_metrics import ChoiceAccuracy as ChoiceAccuracy
from paligemma_jax.evaluation.answer_metrics import CountAccuracy as CountAccuracy
from paligemma_jax.evaluation.answer_metrics import ExactMatch as ExactMatch
from paligemma_jax.evaluation.answer_metrics import OptionLetterAccuracy as OptionLetterAccuracy
from paligemma_jax.evaluation.answer_metrics import PairAnswer as PairAnswer
from paligemma_jax.evaluation.answer_metrics import PairedAccuracy as PairedAccuracy
from paligemma_jax.evaluation.answer_metrics import Perplexity as Perplexity
from paligemma_jax.evaluation.answer_metrics import RelaxedAccuracy as RelaxedAccuracy
from paligemma_jax.evaluation.answer_metrics import SimpleVQAAccuracy as SimpleVQAAccuracy
from paligemma_jax.evaluation.answer_metrics import VQAv2Accuracy as VQAv2Accuracy
from paligemma_jax.evaluation.answer_metrics import YesNo as YesNo
from paligemma_jax.evaluation.answer_metrics import read_count as read_count
from paligemma_jax.evaluation.caption_metrics import BLEU as BLEU
from paligemma_jax.evaluation.caption_metrics import CaptionScores as CaptionScores
from paligemma_jax.evaluation.caption_metrics import CIDEr as CIDEr
from paligemma_jax.evaluation.caption_metrics import Meteor as Meteor
from paligemma_jax.evaluation.caption_metrics import RougeL as RougeL
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
from paligemma_jax.evaluation.detection_metrics import paired_overlaps as paired_overlaps
from paligemma_jax.evaluation.metric import Interval as Interval
from paligemma_jax.evaluation.metric import Metric as Metric
from paligemma_jax.evaluation.metric import bootstrap as bootstrap
from paligemma_jax.evaluation.text_metrics import ANLS as ANLS
from paligemma_jax.evaluation.text_metrics import TextRecognition as TextRecognition
from paligemma_jax.evaluation.text_metrics import anls_score as anls_score
from paligemma_jax.evaluation.text_metrics import indel_similarity as indel_similarity
from paligemma_jax.evaluation.text_metrics import levenshtein as levenshtein
from paligemma_jax.evaluation.text_metrics import normalized_distance as normalized_distance

# Of two lists in one order, or two mappings from ids; see `Metric.compute` and the metric.
anls = ANLS.compute
bleu = BLEU.compute
box_detection = BoxDetection.compute
choice_accuracy = ChoiceAccuracy.compute
cider = CIDEr.compute
count_accuracy = CountAccuracy.compute
exact_match = ExactMatch.compute
meteor = Meteor.compute
option_letter_accuracy = OptionLetterAccuracy.compute
paired_accuracy = PairedAccuracy.compute
perplexity = Perplexity.compute
referring_segmentation = ReferringSegmentation.compute
relaxed_accuracy = RelaxedAccuracy.compute
rouge_l = RougeL.compute
simple_vqa = SimpleVQAAccuracy.compute
text_recognition = TextRecognition.compute
vqa_v2 = VQAv2Accuracy.compute
yes_no = YesNo.compute
