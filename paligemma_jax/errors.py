"""Every error a user can cause: what does not fit, what would, and the call that mends it."""

from collections.abc import Sequence


class PaliGemmaError(ValueError):
    """Base of all errors raised on purpose by this library."""


class InvalidImageError(PaliGemmaError):
    """An image cannot be read, or is none."""


class InvalidPromptError(PaliGemmaError):
    """A prompt, label or answer is malformed or longer than the model can take."""


class InvalidMaskError(PaliGemmaError):
    """A mask, polygon or box is malformed, empty, or does not fit the image."""


class CheckpointError(PaliGemmaError):
    """A checkpoint is missing, damaged, unsafe, or does not fit the model."""


class ConfigError(PaliGemmaError):
    """An architecture or run configuration is inconsistent or incomplete."""


class DatasetError(PaliGemmaError):
    """Training or evaluation data is missing or malformed."""


class UnexpectedAnswerError(PaliGemmaError):
    """The model's answer is not of the kind that was asked for, such as a number."""


class MissingExtraError(PaliGemmaError, ImportError):
    """An optional dependency is needed; the message names the pip extra."""

    def __init__(self, feature: str, extra: str):
        super().__init__(
            f"{feature} needs packages that are not installed. They come with the extra "
            f'"{extra}". Run: pip install "paligemma-jax[{extra}]"'
        )
        self._about = feature, extra

    def __reduce__(self) -> tuple[type["MissingExtraError"], tuple[str, str]]:
        return type(self), self._about  # it may be raised in a worker process


_FIRST, _LAST = 14, 6  # of many problems, which are told by kind


def problem_list(problems: Sequence[str]) -> str:
    """Problems for an error message: "(2 problems):" and an indented line each, at most twenty."""
    lines = list(problems)
    if len(problems) > _FIRST + _LAST:
        lines[_FIRST:-_LAST] = [f"... {len(problems) - _FIRST - _LAST} more ..."]
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    return f"({count}):\n  " + "\n  ".join(lines)
