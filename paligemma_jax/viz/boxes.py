"""Boxes and labels drawn on a picture."""

from PIL import Image, ImageDraw, ImageFont

from paligemma_jax.processing.detections import Detections

# Okabe and Ito's palette, which colour-blind people can tell apart (jfly.uni-koeln.de/color).
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def draw_boxes(image: Image.Image, detections: Detections) -> Image.Image:
    """A copy of the picture with every box outlined, one colour a label, and its label above it."""
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    side = min(drawn.size)
    width = max(1, round(side / 160))
    font = ImageFont.load_default(size=max(10, round(side / 28)))
    colours: dict[str, str] = {}
    for label, corners in zip(detections.labels, detections.xyxy, strict=True):
        colour = colours.setdefault(label, PALETTE[len(colours) % len(PALETTE)])
        x1, y1, x2, y2 = (float(v) for v in corners)
        # White under the colour keeps the outline visible on any background.
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="white", width=width + 2)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=width)
        if label:
            _tag(draw, label, x1, y1, colour, font, drawn.width)
    return drawn


def _tag(
    draw: ImageDraw.ImageDraw,
    label: str,
    x: float,
    y: float,
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    picture_width: int,
) -> None:
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    width, height = right - left + 6, bottom - top + 4
    x = max(0.0, min(x, picture_width - width))
    y = y - height if y >= height else y
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 3 - left, y + 2 - top), label, fill="black", font=font)
