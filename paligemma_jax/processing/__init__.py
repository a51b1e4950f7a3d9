"""Pictures and words in, boxes out: everything between a user's input and the model's arrays."""

from paligemma_jax.processing.batch import Batch as Batch
from paligemma_jax.processing.buckets import group_by_image_count as group_by_image_count
from paligemma_jax.processing.encoding import OnePieceEncoding as OnePieceEncoding
from paligemma_jax.processing.encoding import ThreePieceEncoding as ThreePieceEncoding
from paligemma_jax.processing.image import Bicubic as Bicubic
from paligemma_jax.processing.image import BilinearTruncated as BilinearTruncated
from paligemma_jax.processing.image import ImagePreprocessing as ImagePreprocessing
from paligemma_jax.processing.image_source import load_image as load_image
from paligemma_jax.processing.overflow import Refuse as Refuse
from paligemma_jax.processing.overflow import Truncate as Truncate
from paligemma_jax.processing.parsing import Box as Box
from paligemma_jax.processing.parsing import format_boxes as format_boxes
from paligemma_jax.processing.parsing import parse_boxes as parse_boxes
from paligemma_jax.processing.processor import Processor as Processor
from paligemma_jax.processing.tokenizer import Tokenizer as Tokenizer
