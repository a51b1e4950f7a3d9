"""PaliGemma and PaliGemma 2 in JAX and Flax.

    import paligemma_jax as pg
    pali = pg.from_pretrained("demo")
    print(pali.caption("picture.png"), pali.detect("picture.png", "circle"))
"""

from paligemma_jax.config import VARIANTS as VARIANTS
from paligemma_jax.config import GemmaConfig as GemmaConfig
from paligemma_jax.config import PaliGemmaConfig as PaliGemmaConfig
from paligemma_jax.config import SigLIPConfig as SigLIPConfig
from paligemma_jax.errors import CheckpointError as CheckpointError
from paligemma_jax.errors import ConfigError as ConfigError
from paligemma_jax.errors import DatasetError as DatasetError
from paligemma_jax.errors import InvalidImageError as InvalidImageError
from paligemma_jax.errors import InvalidPromptError as InvalidPromptError
from paligemma_jax.errors import MissingExtraError as MissingExtraError
from paligemma_jax.errors import PaliGemmaError as PaliGemmaError
from paligemma_jax.errors import UnexpectedAnswerError as UnexpectedAnswerError
from paligemma_jax.generate import Greedy as Greedy
from paligemma_jax.generate import Temperature as Temperature
from paligemma_jax.generate import generate as generate
from paligemma_jax.models.paligemma import PaliGemma as PaliGemma
from paligemma_jax.pipeline import Generation as Generation
from paligemma_jax.pipeline import Pipeline as Pipeline
from paligemma_jax.pipeline import from_pretrained as from_pretrained
from paligemma_jax.pipeline import load_model as load_model
from paligemma_jax.pipeline import load_processor as load_processor
from paligemma_jax.processing import Batch as Batch
from paligemma_jax.processing import Processor as Processor
from paligemma_jax.processing import Tokenizer as Tokenizer
from paligemma_jax.processing.detections import Detections as Detections
from paligemma_jax.weights.convert import convert as convert

__version__ = "0.1.0"
