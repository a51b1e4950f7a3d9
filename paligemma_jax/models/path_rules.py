"""Settings by parameter path: regular expressions that match whole paths, the first match wins.

big_vision's rule for schedules (None freezes), learning rate multipliers and weight decay.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from paligemma_jax.errors import ConfigError

Value = TypeVar("Value", covariant=True)


@dataclasses.dataclass(frozen=True)
class Rules(Generic[Value]):
    """Pairs of a regular expression over paths such as "llm/layers/attn/q_einsum/w" and a value."""

    rules: tuple[tuple[str, Value], ...]

    def cover(self, paths: Iterable[str], what: str) -> dict[str, Value]:
        """The value of every path; `what` names the rules in errors.

        Raises ConfigError, listing every problem at once, if a path has no rule or if a rule
        matches no path at all.
        """
        paths = list(paths)
        found = self.find(paths, what)
        missing = [path for path in paths if path not in found]
        if missing:
            shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
            raise ConfigError(
                f"{what} has no rule for {len(missing)} of {len(paths)} parameters: {shown}. Rules "
                'that cover every parameter fit. Add a last rule such as (".*", None), which '
                "freezes the rest."
            )
        return found

    def find(self, paths: Iterable[str], what: str) -> dict[str, Value]:
        """The value of every path that has one; ConfigError if a rule matches no path at all."""
        paths = list(paths)
        patterns = [self._compile(pattern, what) for pattern, _ in self.rules]
        idle = [p.pattern for p in patterns if not any(p.fullmatch(path) for path in paths)]
        if idle:
            hints = ", ".join(repr(pattern) + _suggest(pattern, paths) for pattern in idle)
            raise ConfigError(
                f"{what} has rules that match no parameter: {hints}. A rule must match a whole "
                'path, such as "llm/layers/attn/.*". List the paths: paligemma info CHECKPOINT'
            )
        found = {}
        for path in paths:
            for pattern, (_, value) in zip(patterns, self.rules, strict=True):
                if path not in found and pattern.fullmatch(path):
                    found[path] = value
        return found

    def first(self, path: str, default: Any) -> Any:
        """The value of the first rule that matches `path`, or `default`."""
        return next((v for pattern, v in self.rules if re.fullmatch(pattern, path)), default)

    @staticmethod
    def _compile(pattern: str, what: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern)
        except re.error as e:
            raise ConfigError(
                f"{what} has the rule {pattern!r}, which is no regular expression ({e}). A Python "
                'regular expression fits. Write for example "img/.*"'
            ) from e


def _suggest(pattern: str, paths: list[str]) -> str:
    """' (did you mean ...?)' with the nearest path that has a part like the pattern's."""
    near = difflib.get_close_matches(pattern.replace(".*", ""), paths, n=1, cutoff=0.3)
    return f" (the nearest path is {near[0]!r})" if near else ""
