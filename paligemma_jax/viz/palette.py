"""Colours that colour-blind people can tell apart, one a label."""

from collections.abc import Iterable

from PIL import ImageColor

# Okabe and Ito's palette without black (jfly.uni-koeln.de/color).
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")

Colour = tuple[int, int, int]


def label_colours(labels: Iterable[str]) -> dict[str, Colour]:
    """A colour (red, green, blue in 0..255) for each label, in the order they come in.

    From the eighth label on colours come again; the words beside the boxes tell them apart.
    """
    names = dict.fromkeys(labels)
    return {name: _rgb(PALETTE[place % len(PALETTE)]) for place, name in enumerate(names)}


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever has the higher contrast to `colour` (WCAG 2)."""
    linear = [((v / 255 + 0.055) / 1.055) ** 2.4 if v > 10 else v / 255 / 12.92 for v in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # (luminance + 0.05) / 0.05 against 1.05 / (luminance + 0.05)
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 1.05 * 0.05 else (255, 255, 255)


def _rgb(text: str) -> Colour:
    red, green, blue = ImageColor.getrgb(text)[:3]
    return red, green, blue
