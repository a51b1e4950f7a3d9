"""The masks of `paligemma segment` as files, one an object."""

import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma_jax.cli.picture_files import (
    check_parent,
    exists_already,
    save_picture,
    stems,
    user_path,
)
from paligemma_jax.errors import PaliGemmaError

if TYPE_CHECKING:
    from paligemma_jax.processing.segmentations import Segmentations

OPTION = "--masks"
_LONGEST = 60  # characters of a label in a file's name


class MaskFiles:
    """Writes masks as directory/picture-1-label.png: 8 bits a pixel, 255 in the object, 0 outside.

    Raises PaliGemmaError before any work is done if the directory cannot be written into, or if it
    holds masks of one of the pictures already and `force` is not set; `taken` are files that the
    command writes elsewhere.
    """

    def __init__(
        self, out: str, pictures: Sequence[str], *, force: bool, taken: Collection[Path] = ()
    ):
        self._directory = user_path(out)
        self._force = force
        self._taken = set(taken)
        if os.path.lexists(self._directory) and not os.path.isdir(self._directory):
            raise PaliGemmaError(
                f"{out} is a file. A directory fits, which need not exist. Choose for example: "
                f"{OPTION} masks/"
            )
        check_parent(self._directory / "mask.png", OPTION)
        self._stems = stems(pictures, self._directory)
        for present in [] if force else _masks_in(self._directory, set(self._stems.values())):
            raise exists_already(present, OPTION)

    def save(self, picture: str, found: "Segmentations") -> list[str]:
        """Writes the masks of one picture, whose paths are returned; raises PaliGemmaError."""
        import numpy as np
        from PIL import Image

        paths = []
        for number, one in enumerate(found, 1):
            name = f"{self._stems[picture]}-{number}-{file_name_part(one.label)}.png"
            path = self._directory / name
            if path in self._taken:
                raise exists_already(path, OPTION)
            pixels = Image.fromarray(one.mask.astype(np.uint8) * 255)
            save_picture(pixels, path, force=self._force, option=OPTION)
            self._taken.add(path)
            paths.append(str(path))
        return paths


def file_name_part(label: str) -> str:
    """A label in letters that are safe in a file's name anywhere: "Café ?" -> "Cafe"."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain)[:_LONGEST].strip("-") or "object"


def _masks_in(directory: Path, names: set[str]) -> list[Path]:
    """Files in a directory that look like masks of pictures of these names."""
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    matches = ((file, re.fullmatch(r"(.*?)-\d+-[A-Za-z0-9-]+\.png", file.name)) for file in files)
    return [file for file, match in matches if match and match[1] in names]
