"""Pictures that a data file names: files in one folder, and nothing outside it."""

import dataclasses
import os
from pathlib import Path

from paligemma_jax.errors import DatasetError


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Turns names into paths below `root`; links that lead out of it are followed if `links`."""

    root: Path
    links: bool = False

    def path_of(self, name: str) -> Path:
        """The path of a picture; raises DatasetError for a name that leads out of the folder.

        Whether there is such a file is not looked at.
        """
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise DatasetError(
                f"The picture {name!r} has no name. The name of a file in {self.root} fits. "
                'Write for example: "image": "cat.jpg"'
            )
        path = Path(os.path.normpath(self.root / name))
        inside = path.is_relative_to(os.path.normpath(self.root))
        if inside and not self.links:
            inside = path.resolve().is_relative_to(self.root.resolve())
        if not inside:
            raise DatasetError(
                f"The picture {name!r} leads out of the folder {self.root}. Files in it fit. "
                "If you trust the data, name a folder that holds all: images=ImageFolder(Path('/'))"
            )
        return path
