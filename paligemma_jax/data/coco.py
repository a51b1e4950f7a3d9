"""COCO annotations -> records that ask for all classes of the file in every picture."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from paligemma_jax.data.coco_file import CocoFile, read_coco
from paligemma_jax.data.coco_masks import encode_coco_masks
from paligemma_jax.data.image_folder import ImageFolder
from paligemma_jax.data.problem import Problem
from paligemma_jax.data.record import Record, check_number
from paligemma_jax.errors import DatasetError
from paligemma_jax.processing import prompts
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.parsing import Box, format_answer

_log = logging.getLogger(__name__)


class _CocoSource:
    """One record a picture; a picture without objects has an empty answer."""

    def __init__(
        self,
        path: Path,
        images: str | os.PathLike[str] | ImageFolder | None,
        file: CocoFile,
        prefix: str,
        suffixes: list[str],
        problems: tuple[Problem, ...],
    ):
        folder = path.parent if images is None else images
        self.path = path
        self.images = folder if isinstance(folder, ImageFolder) else ImageFolder(Path(folder))
        self.classes = file.classes
        self.problems = problems
        self._digest = file.digest
        self._prefix = prefix
        # Text alone goes to the processes that read: a parsed file can be gigabytes.
        self._rows = [
            (picture.place, picture.name, (picture.width, picture.height), suffix)
            for picture, suffix in zip(file.pictures, suffixes, strict=True)
        ]
        if problems:
            _log.warning(
                "%s: %d boxes or masks are left out or clipped, the first: %s: %s",
                path, len(problems), problems[0].place, problems[0].text,
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        place, name, size, suffix = self._rows[check_number(index, len(self), self.path)]
        try:
            image = self.images.path_of(name)
        except DatasetError as e:
            raise DatasetError(f"{place}: {e}") from e
        return Record((image,), self._prefix, suffix, place, size=size)

    def fingerprint(self) -> str:
        """Of the file's contents."""
        return f"{type(self).__name__} {self._digest}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


class CocoDetection(_CocoSource):
    """`detect a ; b ; c` with all classes, and every box of the picture.

    Transforms shuffle the boxes and ask for fewer classes. Boxes are clipped to the picture, and
    left out where nothing remains: `problems` lists those.

    Args:
      path: the annotation file.
      images: the folder of the pictures; the file's own if not given.
      names: other names for classes.
      crowds: whether objects that stand for a crowd are used.

    Raises DatasetError for a file that is not COCO's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        images: str | os.PathLike[str] | ImageFolder | None = None,
        *,
        names: Mapping[str, str] | None = None,
        crowds: bool = False,
    ):
        path = Path(path).expanduser()
        file = read_coco(path, names, crowds)
        suffixes = [
            format_answer(Box(thing.label, *thing.corners) for thing in picture.objects)
            for picture in file.pictures
        ]
        prefix = prompts.detect(file.classes)
        super().__init__(path, images, file, prefix, suffixes, file.problems)


class CocoSegmentation(_CocoSource):
    """`segment a ; b ; c` with all classes, and the box and the mask of every object.

    Masks are encoded once, when the source is made; `cache` is a file that keeps the codes for the
    next time. Boxes are those around the masks. Arguments and errors as in `CocoDetection`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        codec: MaskCodec,
        images: str | os.PathLike[str] | ImageFolder | None = None,
        *,
        names: Mapping[str, str] | None = None,
        crowds: bool = False,
        cache: str | os.PathLike[str] | None = None,
    ):
        path = Path(path).expanduser()
        file = read_coco(path, names, crowds)
        kept = None if cache is None else Path(cache).expanduser()
        boxes, problems = encode_coco_masks(file, codec, kept)
        suffixes = [format_answer(found) for found in boxes]
        prefix = prompts.segment(file.classes)
        super().__init__(path, images, file, prefix, suffixes, file.problems + problems)
