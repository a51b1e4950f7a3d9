"""Answers on standard output, as lines for people or JSON documents for programs."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli.asking import Answered, Unread, ask_each
from paligemma_jax.errors import PaliGemmaError

if TYPE_CHECKING:
    from paligemma_jax.pipeline import Generation


class Report:
    """Prints answers as they come, and remembers whether everything went well."""

    def __init__(self, args: argparse.Namespace, prompt: str):
        self._json: bool = args.json
        self._prompt = prompt
        self._named = len(args.pictures) > 1
        self.failures = 0

    def answer(self, name: str | list[str], answer: "Generation", text: str, **fields: Any) -> None:
        """Prints `text` for people; for programs the answer with further `fields`.

        `name` is a picture, or the list of those that were asked about together.
        """
        if not self._json:
            prefix = f"{name}: " if self._named and isinstance(name, str) else ""
            for line in text.splitlines() or [""]:
                print(f"{prefix}{line}", flush=True)
            return
        self._document(
            name,
            {
                "answer": answer.text,
                **fields,
                "tokens": list(answer.tokens),
                "logprob": math.fsum(answer.logprobs),
            },
        )

    def failure(self, name: str, error: PaliGemmaError, answer: "Generation | None" = None) -> None:
        """Says on standard error what is wrong with one picture or its answer."""
        self.failures += 1
        sys.stdout.flush()
        print(f"paligemma: error: {error}", file=sys.stderr, flush=True)
        if self._json:
            text = None if answer is None else answer.text
            self._document(name, {"answer": text, "error": str(error)})

    @property
    def exit_code(self) -> int:
        """1 if anything failed."""
        return 1 if self.failures else 0

    def _document(self, name: str | list[str], fields: dict[str, Any]) -> None:
        key = "file" if isinstance(name, str) else "files"
        document = {key: name, "prompt": self._prompt, **fields}
        print(json.dumps(document, ensure_ascii=not encodes_unicode()), flush=True)


def report_each(
    args: argparse.Namespace,
    prompt: str,
    present: Callable[[Answered], tuple[str, dict[str, Any]]],
) -> int:
    """Asks about each picture and prints what `present` makes of the answer: text, JSON fields.

    Errors of single pictures and of `present` are reported; the others go on. Returns the exit
    code.
    """
    report = Report(args, prompt)
    for reply in ask_each(args, prompt):
        if isinstance(reply, Unread):
            report.failure(reply.name, reply.error)
            continue
        try:
            text, fields = present(reply)
        except PaliGemmaError as e:
            report.failure(reply.name, e, reply.answer)
        else:
            report.answer(reply.name, reply.answer, text, **fields)
    return report.exit_code


def encodes_unicode() -> bool:
    """Whether standard output can print any letter."""
    return (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
