"""Shared by the tests of images: the demo model's processor, and what color-blind people see."""

import numpy as np
import pytest

from paligemma_jax import Processor, load_processor

# Linear RGB as seen without one kind of cone (Machado, Oliveira, Fernandes 2009, severity 1).
DEFICIENCIES = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
_TO_XYZ = [
    [0.4124, 0.3576, 0.1805],
    [0.2126, 0.7152, 0.0722],
    [0.0193, 0.1192, 0.9505],
]
_WHITE = np.array([0.9505, 1.0, 1.089])


def seen_lab(rgb: np.ndarray, deficiency: str) -> np.ndarray:
    """CIE L*a*b* of 8-bit RGB [n, 3] as seen with a color vision deficiency."""
    unit = np.asarray(rgb, float) / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(DEFICIENCIES[deficiency]).T, 0, 1)
    xyz = seen @ np.array(_TO_XYZ).T / _WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )


@pytest.fixture(params=DEFICIENCIES)
def seen(request: pytest.FixtureRequest):
    """A function from 8-bit RGB [n, 3] to L*a*b*, for each deficiency."""
    return lambda rgb: seen_lab(rgb, request.param)


@pytest.fixture(scope="session")
def processor() -> Processor:
    return load_processor("demo")
