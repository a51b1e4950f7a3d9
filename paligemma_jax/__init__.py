"""PaliGemma and PaliGemma 2 in JAX and Flax.

    import paligemma_jax as pg
    pali = pg.from_pretrained("demo")
    print(pali.caption("image.png"), pali.detect("image.png", "circle"))

Public names are loaded on first use (PEP 562): JAX and Flax take seconds to import, and
`paligemma --help` needs neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paligemma_jax.benchmark.bench import bench as bench
    from paligemma_jax.config import VARIANTS as VARIANTS
    from paligemma_jax.config import GemmaConfig as GemmaConfig
    from paligemma_jax.config import PaliGemmaConfig as PaliGemmaConfig
    from paligemma_jax.config import SigLIPConfig as SigLIPConfig
    from paligemma_jax.data.mixture import Mixture as Mixture
    from paligemma_jax.data.mixture import MixtureComponent as MixtureComponent
    from paligemma_jax.errors import CheckpointError as CheckpointError
    from paligemma_jax.errors import ConfigError as ConfigError
    from paligemma_jax.errors import DatasetError as DatasetError
    from paligemma_jax.errors import InvalidImageError as InvalidImageError
    from paligemma_jax.errors import InvalidMaskError as InvalidMaskError
    from paligemma_jax.errors import InvalidPromptError as InvalidPromptError
    from paligemma_jax.errors import MissingExtraError as MissingExtraError
    from paligemma_jax.errors import PaliGemmaError as PaliGemmaError
    from paligemma_jax.errors import UnexpectedAnswerError as UnexpectedAnswerError
    from paligemma_jax.generation.attention_maps import image_attention_maps as image_attention_maps
    from paligemma_jax.generation.beam_search import beam_search as beam_search
    from paligemma_jax.generation.config import GenerationConfig as GenerationConfig
    from paligemma_jax.generation.constraints import AllOf as AllOf
    from paligemma_jax.generation.constraints import AllowedAnswers as AllowedAnswers
    from paligemma_jax.generation.constraints import Constraint as Constraint
    from paligemma_jax.generation.constraints import TokenMask as TokenMask
    from paligemma_jax.generation.constraints import allow_tokens as allow_tokens
    from paligemma_jax.generation.constraints import allowed_answers as allowed_answers
    from paligemma_jax.generation.constraints import forbid_tokens as forbid_tokens
    from paligemma_jax.generation.detection_grammar import detection_grammar as detection_grammar
    from paligemma_jax.generation.detection_grammar import (
        segmentation_grammar as segmentation_grammar,
    )
    from paligemma_jax.generation.generate import best_of as best_of
    from paligemma_jax.generation.generate import generate as generate
    from paligemma_jax.generation.image_embeddings import EncodedImages as EncodedImages
    from paligemma_jax.generation.prompt_lookup import object_draft_corpus as object_draft_corpus
    from paligemma_jax.generation.prompt_lookup import object_token_classes as object_token_classes
    from paligemma_jax.generation.prompt_lookup import (
        prompt_lookup_generate as prompt_lookup_generate,
    )
    from paligemma_jax.generation.results import Generation as Generation
    from paligemma_jax.generation.results import GenerationEvent as GenerationEvent
    from paligemma_jax.generation.sampling import Chain as Chain
    from paligemma_jax.generation.sampling import Greedy as Greedy
    from paligemma_jax.generation.sampling import MinP as MinP
    from paligemma_jax.generation.sampling import Sampler as Sampler
    from paligemma_jax.generation.sampling import Temperature as Temperature
    from paligemma_jax.generation.sampling import TopK as TopK
    from paligemma_jax.generation.sampling import TopP as TopP
    from paligemma_jax.generation.scoring import Classification as Classification
    from paligemma_jax.generation.scoring import ScoredAnswer as ScoredAnswer
    from paligemma_jax.generation.scoring import classify as classify
    from paligemma_jax.generation.scoring import score as score
    from paligemma_jax.generation.streaming import stream as stream
    from paligemma_jax.generation.token_statistics import LocationStatistics as LocationStatistics
    from paligemma_jax.generation.token_statistics import TokenStatistics as TokenStatistics
    from paligemma_jax.hub.catalogue import MODELS as MODELS
    from paligemma_jax.hub.catalogue import ModelInfo as ModelInfo
    from paligemma_jax.loading import from_pretrained as from_pretrained
    from paligemma_jax.loading import load_model as load_model
    from paligemma_jax.loading import load_processor as load_processor
    from paligemma_jax.models.attention_maps import AttentionRollout as AttentionRollout
    from paligemma_jax.models.attention_maps import EveryHead as EveryHead
    from paligemma_jax.models.attention_maps import MeanAttention as MeanAttention
    from paligemma_jax.models.inference_layout import stack_layers as stack_layers
    from paligemma_jax.models.inference_layout import unstack_layers as unstack_layers
    from paligemma_jax.models.linen import to_linen as to_linen
    from paligemma_jax.models.lora import LoRA as LoRA
    from paligemma_jax.models.lora import add_lora as add_lora
    from paligemma_jax.models.lora import merge_lora as merge_lora
    from paligemma_jax.models.lora import with_dropout as with_dropout
    from paligemma_jax.models.paligemma import PaliGemma as PaliGemma
    from paligemma_jax.models.quantization import quantize as quantize
    from paligemma_jax.models.quantization import quantize_stacked as quantize_stacked
    from paligemma_jax.models.quantization_config import Float8 as Float8
    from paligemma_jax.models.quantization_config import Int4 as Int4
    from paligemma_jax.models.quantization_config import Int8 as Int8
    from paligemma_jax.models.quantization_config import Int8Dynamic as Int8Dynamic
    from paligemma_jax.models.quantization_config import QuantizationConfig as QuantizationConfig
    from paligemma_jax.models.sharding import Axes as Axes
    from paligemma_jax.pipeline import Pipeline as Pipeline
    from paligemma_jax.processing.detections import Detections as Detections
    from paligemma_jax.processing.detections import Segmentations as Segmentations
    from paligemma_jax.processing.detections import draw as draw
    from paligemma_jax.processing.detections import draw_boxes as draw_boxes
    from paligemma_jax.processing.image import load_image as load_image
    from paligemma_jax.processing.location_tokens import Box as Box
    from paligemma_jax.processing.location_tokens import LocationScale as LocationScale
    from paligemma_jax.processing.location_tokens import format_answer as format_answer
    from paligemma_jax.processing.location_tokens import parse_answer as parse_answer
    from paligemma_jax.processing.masks import RLE as RLE
    from paligemma_jax.processing.masks import MaskCodec as MaskCodec
    from paligemma_jax.processing.masks import Polygon as Polygon
    from paligemma_jax.processing.masks import encode_masks as encode_masks
    from paligemma_jax.processing.masks import load_mask as load_mask
    from paligemma_jax.processing.masks import mask_from_coco as mask_from_coco
    from paligemma_jax.processing.processor import Batch as Batch
    from paligemma_jax.processing.processor import Processor as Processor
    from paligemma_jax.processing.reference_parsers import parse_big_vision as parse_big_vision
    from paligemma_jax.processing.reference_parsers import parse_space as parse_space
    from paligemma_jax.processing.reference_parsers import parse_supervision as parse_supervision
    from paligemma_jax.processing.reference_parsers import paste_big_vision as paste_big_vision
    from paligemma_jax.processing.reference_parsers import paste_space as paste_space
    from paligemma_jax.processing.tokenizer import Tokenizer as Tokenizer
    from paligemma_jax.processing.video import read_frames as read_frames
    from paligemma_jax.training.calibrate import calibrate as calibrate
    from paligemma_jax.training.config import TrainConfig as TrainConfig
    from paligemma_jax.training.setup import FineTuneResult as FineTuneResult
    from paligemma_jax.training.trainer import finetune as finetune
    from paligemma_jax.training.trainer import train as train
    from paligemma_jax.viz.attention_maps import draw_attention_maps as draw_attention_maps
    from paligemma_jax.viz.attention_mask import AttentionMaskView as AttentionMaskView
    from paligemma_jax.viz.attention_mask import attention_mask as attention_mask
    from paligemma_jax.weights.convert import convert as convert
    from paligemma_jax.weights.peft import load_adapter as load_adapter
    from paligemma_jax.weights.peft import save_adapter as save_adapter

__version__ = "0.1.0"

# Where each public name is defined.
_NAMES = {
    "benchmark.bench": "bench",
    "config": "GemmaConfig PaliGemmaConfig SigLIPConfig VARIANTS",
    "data.mixture": "Mixture MixtureComponent",
    "errors": (
        "CheckpointError ConfigError DatasetError InvalidImageError InvalidMaskError "
        "InvalidPromptError MissingExtraError PaliGemmaError UnexpectedAnswerError"
    ),
    "generation.attention_maps": "image_attention_maps",
    "generation.beam_search": "beam_search",
    "generation.config": "GenerationConfig",
    "generation.constraints": (
        "AllOf allow_tokens allowed_answers AllowedAnswers Constraint forbid_tokens TokenMask"
    ),
    "generation.detection_grammar": "detection_grammar segmentation_grammar",
    "generation.generate": "best_of generate",
    "generation.image_embeddings": "EncodedImages",
    "generation.prompt_lookup": ("object_draft_corpus object_token_classes prompt_lookup_generate"),
    "generation.results": "Generation GenerationEvent",
    "generation.sampling": "Chain Greedy MinP Sampler Temperature TopK TopP",
    "generation.scoring": "Classification classify score ScoredAnswer",
    "generation.streaming": "stream",
    "generation.token_statistics": "LocationStatistics TokenStatistics",
    "hub.catalogue": "ModelInfo MODELS",
    "loading": "from_pretrained load_model load_processor",
    "models.attention_maps": "AttentionRollout EveryHead MeanAttention",
    "models.inference_layout": "stack_layers unstack_layers",
    "models.linen": "to_linen",
    "models.lora": "add_lora LoRA merge_lora with_dropout",
    "models.paligemma": "PaliGemma",
    "models.quantization": "quantize quantize_stacked",
    "models.quantization_config": "Float8 Int4 Int8 Int8Dynamic QuantizationConfig",
    "models.sharding": "Axes",
    "pipeline": "Pipeline",
    "processing.detections": "Detections draw draw_boxes Segmentations",
    "processing.image": "load_image",
    "processing.location_tokens": "Box format_answer LocationScale parse_answer",
    "processing.masks": "encode_masks load_mask mask_from_coco MaskCodec Polygon RLE",
    "processing.processor": "Batch Processor",
    "processing.reference_parsers": (
        "parse_big_vision parse_space parse_supervision paste_big_vision paste_space"
    ),
    "processing.tokenizer": "Tokenizer",
    "processing.video": "read_frames",
    "training.calibrate": "calibrate",
    "training.config": "TrainConfig",
    "training.setup": "FineTuneResult",
    "training.trainer": "finetune train",
    "viz.attention_mask": "attention_mask AttentionMaskView",
    "viz.attention_maps": "draw_attention_maps",
    "weights.convert": "convert",
    "weights.peft": "load_adapter save_adapter",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
