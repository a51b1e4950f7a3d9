"""Pictures and words in, boxes out: everything between a user's input and the model's arrays."""

from paligemma_jax.processing.image import ImagePreprocessing as ImagePreprocessing
from paligemma_jax.processing.image import load_image as load_image
from paligemma_jax.processing.location_tokens import Box as Box
from paligemma_jax.processing.location_tokens import LocationScale as LocationScale
from paligemma_jax.processing.location_tokens import ParsedAnswer as ParsedAnswer
from paligemma_jax.processing.location_tokens import format_answer as format_answer
from paligemma_jax.processing.location_tokens import parse_answer as parse_answer
from paligemma_jax.processing.masks import RLE as RLE
from paligemma_jax.processing.masks import Polygon as Polygon
from paligemma_jax.processing.masks import crop_for_codec as crop_for_codec
from paligemma_jax.processing.masks import mask_to_polygons as mask_to_polygons
from paligemma_jax.processing.masks import polygons_to_mask as polygons_to_mask
from paligemma_jax.processing.masks import tight_corners as tight_corners
from paligemma_jax.processing.processor import Batch as Batch
from paligemma_jax.processing.processor import Processor as Processor
from paligemma_jax.processing.processor import group_by_image_count as group_by_image_count
from paligemma_jax.processing.tokenizer import Tokenizer as Tokenizer
