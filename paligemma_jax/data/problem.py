"""What can be wrong with data, and where."""

import dataclasses
import enum


class Kind(enum.Enum):
    """Kinds of problems; the value is their heading in a report."""

    UNREADABLE = "records that cannot be read"
    PICTURE = "pictures that are missing or broken"
    SIZE = "pictures of another size than their boxes"
    BOX = "boxes or masks that are none, or leave the picture"
    LABEL = "labels that the prompt does not ask for"
    EMPTY = "empty answers"
    TEXT = "prompts and answers with space or line breaks around them"
    BLANK = "blank lines, passed over"
    LONG = "texts that do not fit"
    REPEATED = "records that come more than once"
    SHARED = "pictures that are in more than one split"

    @property
    def stops_training(self) -> bool:
        """Whether training stops at such a record, unless it is told to skip."""
        return self in (Kind.UNREADABLE, Kind.PICTURE, Kind.SIZE, Kind.LONG)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem: where it is, such as "train.jsonl:17", and what it is."""

    kind: Kind
    place: str
    text: str
