"""Every name that a setting on the command line may call: --config.lora='LoRA(rank=16)'.

Also one import for configuration files: `from paligemma_jax.training.choices import Epochs, LoRA`.
"""

from paligemma_jax.data.coco import CocoSource as CocoSource
from paligemma_jax.data.mixture import Mixture as Mixture
from paligemma_jax.data.mixture import MixtureComponent as MixtureComponent
from paligemma_jax.data.object_readers import CycleObjects as CycleObjects
from paligemma_jax.data.object_readers import ObjectReader as ObjectReader
from paligemma_jax.data.object_readers import Outlined as Outlined
from paligemma_jax.data.object_readers import Referring as Referring
from paligemma_jax.data.readers import Fields as Fields
from paligemma_jax.data.readers import ShuffleOptions as ShuffleOptions
from paligemma_jax.data.record import ImageFolder as ImageFolder
from paligemma_jax.data.sources import JsonlSource as JsonlSource
from paligemma_jax.data.sources import TfdsSource as TfdsSource
from paligemma_jax.data.tasks import PromptReader as PromptReader
from paligemma_jax.data.tasks import TaskReader as TaskReader
from paligemma_jax.data.transforms import CycleAnswers as CycleAnswers
from paligemma_jax.data.transforms import InceptionCrop as InceptionCrop
from paligemma_jax.data.transforms import LowerCase as LowerCase
from paligemma_jax.data.transforms import MostFrequentAnswer as MostFrequentAnswer
from paligemma_jax.data.transforms import RandomAnswer as RandomAnswer
from paligemma_jax.data.transforms import RandomCrop as RandomCrop
from paligemma_jax.data.transforms import SampleClasses as SampleClasses
from paligemma_jax.data.transforms import ShuffleBoxes as ShuffleBoxes
from paligemma_jax.models.lora import LoRA as LoRA
from paligemma_jax.models.quantization_config import Int4 as Int4
from paligemma_jax.models.quantization_config import Int8 as Int8
from paligemma_jax.models.quantization_config import QuantizationConfig as QuantizationConfig
from paligemma_jax.models.sharding import Axes as Axes
from paligemma_jax.models.sharding import Rules as Rules
from paligemma_jax.training.checkpoints import Best as Best
from paligemma_jax.training.config import Data as Data
from paligemma_jax.training.optimizer import SGD as SGD
from paligemma_jax.training.optimizer import Adafactor as Adafactor
from paligemma_jax.training.optimizer import Adam as Adam
from paligemma_jax.training.optimizer import AdamW as AdamW
from paligemma_jax.training.optimizer import Constant as Constant
from paligemma_jax.training.optimizer import Cosine as Cosine
from paligemma_jax.training.optimizer import Epochs as Epochs
from paligemma_jax.training.optimizer import Examples as Examples
from paligemma_jax.training.optimizer import Linear as Linear
from paligemma_jax.training.optimizer import ReciprocalSquareRoot as ReciprocalSquareRoot
from paligemma_jax.training.optimizer import Share as Share
from paligemma_jax.training.optimizer import Steps as Steps
from paligemma_jax.training.step import SkipBadLoss as SkipBadLoss
from paligemma_jax.training.step import StepConfig as StepConfig
from paligemma_jax.training.step import StopAtBadLoss as StopAtBadLoss
