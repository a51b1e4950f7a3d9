"""Records from what Python holds already: a list of records or dicts, a Hugging Face dataset."""

from collections.abc import Mapping
from typing import Any

from paligemma_jax.data.readers import Fields, Reader
from paligemma_jax.data.record import Record, check_number
from paligemma_jax.errors import DatasetError


class RowSource:
    """Entries of `rows`, anything with a length and numbered entries: `Record`s or mappings.

    A `datasets.Dataset` of Hugging Face is one; of a `DatasetDict` take a split. `reader` makes a
    record of a mapping; without, its "image", "prefix" and "suffix" are taken. `name` goes into
    the ids. Raises DatasetError for what has no length, and for nothing.
    """

    def __init__(self, rows: Any, reader: Reader | None = None, name: str = "record"):
        if isinstance(rows, Mapping):
            raise DatasetError(
                f"A mapping with the keys {', '.join(map(str, list(rows)[:6]))} has no numbered "
                "records. A list of records, or one split of a dataset, fits. Take a split, for "
                "example: dataset['train']"
            )
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise DatasetError(
                f"{type(rows).__name__} has no length or no numbered entries. A list, or a dataset "
                "that is not streamed, fits. Call list(...), or load it without streaming=True"
            )
        if not len(rows):
            raise DatasetError(
                "There are no records. At least one fits. Check how the list was made."
            )
        self.rows = rows
        self.reader = reader or Fields()
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        index = check_number(index, len(self), self.name)
        place = f"{self.name}:{index}"
        try:
            row = self.rows[index]
        except Exception as e:  # a dataset that decodes pictures fails with whatever they hold
            raise DatasetError(
                f"{place} cannot be read: {type(e).__name__}: {e}. A readable record fits. Leave "
                "it out, or mend its picture."
            ) from e
        if isinstance(row, Record):
            return row
        if not isinstance(row, Mapping):
            raise DatasetError(
                f"{place} is {type(row).__name__}. A Record or a dict fits, such as "
                "{'image': 'cat.jpg', 'prefix': 'caption en', 'suffix': 'a cat'}."
            )
        try:
            return self.reader(row, place)
        except DatasetError as e:
            raise DatasetError(f"{place}: {e}") from e

    def __repr__(self) -> str:
        return f"RowSource({type(self.rows).__name__} of {len(self)}, name={self.name!r})"
