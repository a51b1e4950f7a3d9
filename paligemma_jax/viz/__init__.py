"""Pictures of results."""

from paligemma_jax.drawing import draw as draw
from paligemma_jax.drawing import draw_boxes as draw_boxes
