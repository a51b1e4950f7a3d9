"""Recipes for rounding as people write them: "int4", or "attention=int8,mlp=int4:128"."""

import re
from collections.abc import Mapping

KINDS = ("attention", "mlp", "table", "image")
FORMATS = ("int8", "int8-dynamic", "int4", "float8")
RECIPES = (*FORMATS, "mixed")
NOTHING = "none"
FITTING = (
    f"{', '.join(RECIPES)} fit, or formats of parts, such as "
    "'attention=int8,mlp=int4:128,table=int8,image=int8'"
)
_MIXED = {"attention": "int8", "mlp": "int4", "table": "int8", "image": "int8"}
_FORMAT = re.compile(r"int8|int8-dynamic|float8|int4(:(row|[1-9]\d{0,5}))?")


def read_recipe(text: str) -> dict[str, str | None]:
    """The format's name of each of `KINDS`, None for one that stays as it is.

    A format alone is for the language model, and 4 bits leave its table at 8. Parts that are not
    named stay as they are. Raises ValueError, whose words say what is wrong.
    """
    if text == "mixed":
        return dict(_MIXED)
    if _FORMAT.fullmatch(text):
        table = "int8" if text.startswith("int4") else text
        return {"attention": text, "mlp": text, "table": table, "image": None}
    if "=" not in text:
        raise ValueError(f"there is no recipe {text!r}")
    parts = [part.partition("=") for part in text.split(",")]
    given = {kind.strip(): name.strip() for kind, _, name in parts}
    if len(given) < len(parts):
        raise ValueError(f"a part comes twice in {text!r}")
    problems = find_problems(given)
    if problems:
        raise ValueError("; ".join(problems))
    return {kind: None if (n := given.get(kind, NOTHING)) == NOTHING else n for kind in KINDS}


def find_problems(formats: Mapping[str, object]) -> list[str]:
    """A few words for each part or format that is not known."""
    problems = [f"there is no part {kind!r}" for kind in formats if kind not in KINDS]
    for kind, name in formats.items():
        known = name is None or name == NOTHING
        if not known and not (isinstance(name, str) and _FORMAT.fullmatch(name)):
            problems.append(f"there is no format {name!r} (of {kind})")
    return problems
