"""Numbers as colours whose lightness rises evenly, so that colour-blind people can read them."""

import numpy as np
from jaxtyping import Float, UInt8

# Ten points of matplotlib's "viridis" (S. van der Walt, N. Smith; CC0), equally far apart.
_VIRIDIS = (
    "#440154", "#482878", "#3E4989", "#31688E", "#26828E",
    "#1F9E89", "#35B779", "#6ECE58", "#B5DE2B", "#FDE725",
)  # fmt: skip
_POINTS = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in _VIRIDIS], np.float32)


def viridis(values: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "... 3"]:
    """RGB of values in 0..1 (others are clipped): dark violet, green, bright yellow."""
    places = np.linspace(0, 1, len(_POINTS))
    clipped = np.clip(values, 0, 1)
    channels = [np.interp(clipped, places, _POINTS[:, c]) for c in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)
