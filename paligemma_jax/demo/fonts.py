"""The fonts of the demo world: DejaVu, cut down to ASCII letters and digits.

Their licence stands beside them in fonts/LICENSE_DEJAVU.
"""

import functools
import io
from importlib import resources

from PIL import Image, ImageDraw, ImageFont

FONTS: tuple[str, ...] = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
)


@functools.lru_cache(maxsize=32)
def load_font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    """Returns font `name` (one of FONTS) at an em of `pixels`, read from the package."""
    data = (resources.files("paligemma_jax.demo") / "fonts" / f"{name}.ttf").read_bytes()
    # The basic layout engine is the one that every Pillow build has: pictures are equal everywhere.
    return ImageFont.truetype(io.BytesIO(data), pixels, layout_engine=ImageFont.Layout.BASIC)


def ink_mask(name: str, string: str, pixels: int) -> Image.Image:
    """Returns an "L" image that holds the ink of `string` and nothing else, em of `pixels`."""
    font = load_font(name, pixels)
    left, top, right, bottom = map(int, font.getbbox(string))  # with the side bearings
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), string, fill=255, font=font)
    return mask.crop(mask.getbbox())


@functools.lru_cache(maxsize=4096)
def ink_shape(name: str, string: str) -> tuple[float, float]:
    """Returns (width, height) of the ink of `string`, in units of the font's capital height."""
    width, height = ink_mask(name, string, 128).size
    capital = ink_mask(name, "H", 128).height
    return width / capital, height / capital
