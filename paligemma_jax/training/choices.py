"""Every name that a setting on the command line may call: --config.lora='LoRA(rank=16)'.

Also one import for configuration files: `from paligemma_jax.training.choices import Epochs, LoRA`.
"""

from paligemma_jax.data import Answer as Answer
from paligemma_jax.data import AskForSome as AskForSome
from paligemma_jax.data import Caption as Caption
from paligemma_jax.data import CocoDetection as CocoDetection
from paligemma_jax.data import CocoSegmentation as CocoSegmentation
from paligemma_jax.data import Detect as Detect
from paligemma_jax.data import EachAnswerInTurn as EachAnswerInTurn
from paligemma_jax.data import Fields as Fields
from paligemma_jax.data import ImageFolder as ImageFolder
from paligemma_jax.data import InceptionCrop as InceptionCrop
from paligemma_jax.data import JsonlSource as JsonlSource
from paligemma_jax.data import LowerCase as LowerCase
from paligemma_jax.data import MostFrequentAnswer as MostFrequentAnswer
from paligemma_jax.data import Ocr as Ocr
from paligemma_jax.data import RandomAnswer as RandomAnswer
from paligemma_jax.data import RandomCrop as RandomCrop
from paligemma_jax.data import RandomJpeg as RandomJpeg
from paligemma_jax.data import RandomResize as RandomResize
from paligemma_jax.data import ShuffleBoxes as ShuffleBoxes
from paligemma_jax.data import SkipBadRecords as SkipBadRecords
from paligemma_jax.data import StopAtBadRecord as StopAtBadRecord
from paligemma_jax.data import TfdsSource as TfdsSource
from paligemma_jax.data import XYWHPixels as XYWHPixels
from paligemma_jax.data import XYXYPixels as XYXYPixels
from paligemma_jax.data import YXYXFractions as YXYXFractions
from paligemma_jax.models.lora import LoRA as LoRA
from paligemma_jax.models.recipe import Int4 as Int4
from paligemma_jax.models.recipe import Int8 as Int8
from paligemma_jax.models.recipe import Mixed as Mixed
from paligemma_jax.models.remat import KeepAll as KeepAll
from paligemma_jax.models.remat import KeepInputs as KeepInputs
from paligemma_jax.models.remat import KeepProducts as KeepProducts
from paligemma_jax.processing.overflow import Refuse as Refuse
from paligemma_jax.processing.overflow import Truncate as Truncate
from paligemma_jax.training.bad_loss import SkipBadLoss as SkipBadLoss
from paligemma_jax.training.bad_loss import StopAtBadLoss as StopAtBadLoss
from paligemma_jax.training.checkpoints import Best as Best
from paligemma_jax.training.optimizer import SGD as SGD
from paligemma_jax.training.optimizer import Adafactor as Adafactor
from paligemma_jax.training.optimizer import Adam as Adam
from paligemma_jax.training.optimizer import AdamW as AdamW
from paligemma_jax.training.records import Data as Data
from paligemma_jax.training.schedules import Constant as Constant
from paligemma_jax.training.schedules import Cosine as Cosine
from paligemma_jax.training.schedules import Epochs as Epochs
from paligemma_jax.training.schedules import Examples as Examples
from paligemma_jax.training.schedules import Linear as Linear
from paligemma_jax.training.schedules import ReciprocalSquareRoot as ReciprocalSquareRoot
from paligemma_jax.training.schedules import Share as Share
from paligemma_jax.training.schedules import Steps as Steps
from paligemma_jax.training.sharding import Axes as Axes
from paligemma_jax.training.step import StepConfig as StepConfig
from paligemma_jax.training.trainable import Rules as Rules
