"""Pictures and words in, boxes out: everything between a user's input and the model's arrays."""

from paligemma_jax.processing.batch import Batch as Batch
from paligemma_jax.processing.buckets import group_by_image_count as group_by_image_count
from paligemma_jax.processing.encoding import OnePieceEncoding as OnePieceEncoding
from paligemma_jax.processing.encoding import ThreePieceEncoding as ThreePieceEncoding
from paligemma_jax.processing.image import Bicubic as Bicubic
from paligemma_jax.processing.image import BilinearTruncated as BilinearTruncated
from paligemma_jax.processing.image import ImagePreprocessing as ImagePreprocessing
from paligemma_jax.processing.image_source import load_image as load_image
from paligemma_jax.processing.masks import crop_for_codec as crop_for_codec
from paligemma_jax.processing.masks import tight_corners as tight_corners
from paligemma_jax.processing.overflow import Refuse as Refuse
from paligemma_jax.processing.overflow import Truncate as Truncate
from paligemma_jax.processing.parsing import Box as Box
from paligemma_jax.processing.parsing import LocationScale as LocationScale
from paligemma_jax.processing.parsing import ParsedAnswer as ParsedAnswer
from paligemma_jax.processing.parsing import format_answer as format_answer
from paligemma_jax.processing.parsing import parse_answer as parse_answer
from paligemma_jax.processing.polygons import Polygon as Polygon
from paligemma_jax.processing.polygons import mask_to_polygons as mask_to_polygons
from paligemma_jax.processing.polygons import polygons_to_mask as polygons_to_mask
from paligemma_jax.processing.processor import Processor as Processor
from paligemma_jax.processing.rle import RLE as RLE
from paligemma_jax.processing.tokenizer import Tokenizer as Tokenizer
