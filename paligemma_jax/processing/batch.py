"""What a model takes: pictures, tokens and masks of several examples in arrays of one shape."""

import dataclasses

import jax
import numpy as np

# Letters: B rows, N pictures a row, H W pixels, T text tokens.
Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples, right-padded to one text length and to one number of rows.

    Attributes:
      images: f32[B, N, H, W, 3] in [-1, 1]; None where there are no pictures.
      tokens: i32[B, T], starting with bos; 0 is padding.
      mask_ar: i32[B, T], 0 where a token and those before it see each other (prompt), 1 where it is
        seen only by later ones (answer and padding).
      mask_input: bool[B, T], False on padding.
      mask_loss: i32[B, T], 1 on the tokens to learn; None outside training.
      row_mask: bool[B], False on rows that only fill the batch; None if all are real.
    """

    images: Array | None
    tokens: Array
    mask_ar: Array
    mask_input: Array
    mask_loss: Array | None = None
    row_mask: Array | None = None
