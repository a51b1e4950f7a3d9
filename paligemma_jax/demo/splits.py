"""Which random numbers belong to training and which are held out: never the same ones."""

import numpy as np

from paligemma_jax.demo.scene import Scene, sample_pair, sample_scene

TRAINING, HELD_OUT = 0, 1
PAIRS, PAGES, MASKS = 2, 4, 6  # added to a split: picture pairs, pages to read, masks to encode
_LIMIT = 2**32  # one word of SeedSequence entropy each, so no two (seed, split, index) coincide


def split_rng(seed: int, split: int, index: int) -> np.random.Generator:
    """Returns the generator of item `index` of a split; no other triple shares its stream.

    Raises:
      ValueError: if a number is negative or does not fit 32 bits.
    """
    for name, value in (("seed", seed), ("split", split), ("index", index)):
        if not 0 <= value < _LIMIT:
            raise ValueError(f"{name} {value} does not fit. It must be 0 <= {name} < 2**32.")
    return np.random.default_rng(np.random.SeedSequence([seed, split, index]))


def held_out_scenes(seed: int = 2026, count: int = 500) -> list[Scene]:
    """Returns scenes that no training run can have seen, whatever its seed."""
    return [sample_scene(split_rng(seed, HELD_OUT, index)) for index in range(count)]


def held_out_pairs(seed: int = 2026, count: int = 500) -> list[tuple[Scene, Scene, bool]]:
    """Returns held-out pairs of scenes, each with whether the two show the same."""
    return [sample_pair(split_rng(seed, HELD_OUT + PAIRS, index)) for index in range(count)]
