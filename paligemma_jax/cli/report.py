"""Answers on standard output, as lines for people or JSON documents for programs."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

from paligemma_jax.cli.asking import A, Answered, Ask, Unread, ask_each, ask_together
from paligemma_jax.errors import PaliGemmaError

Shown = tuple[str, dict[str, Any]]  # lines for people, and the JSON document's fields


@dataclasses.dataclass(frozen=True)
class Subject:
    """What an answer is about: what its lines begin with, and its part of a document."""

    label: str | None  # where it is one of several
    fields: dict[str, Any]


class Report:
    """Prints answers as they come, and remembers whether everything went well."""

    def __init__(self, args: argparse.Namespace):
        self._json: bool = args.json
        self.failures = 0

    def answer(self, subject: Subject, shown: Shown) -> None:
        """Prints what is shown to people, or the document for programs."""
        text, fields = shown
        if self._json:
            print_json(subject.fields | fields)
            return
        prefix = f"{subject.label}: " if subject.label else ""
        for line in text.splitlines() or [""]:
            print(f"{prefix}{line}", flush=True)

    def failure(self, subject: Subject, error: PaliGemmaError, answer: str | None = None) -> None:
        """Says on standard error what is wrong with one picture or its answer."""
        self.failures += 1
        sys.stdout.flush()
        print(f"paligemma: error: {error}", file=sys.stderr, flush=True)
        if self._json:
            print_json(subject.fields | {"answer": answer, "error": str(error)})

    @property
    def exit_code(self) -> int:
        """1 if anything failed."""
        return 1 if self.failures else 0


def picture_subject(args: argparse.Namespace, name: str, prompt: str) -> Subject:
    """A prompt about one of the pictures that a command was given."""
    label = name if len(args.pictures) > 1 else None
    return Subject(label, {"file": name, "prompt": prompt})


def report_each(
    args: argparse.Namespace,
    prompt: str,
    ask: Ask[A],
    present: Callable[[Answered[A]], Shown],
) -> int:
    """Asks about each picture and prints what `present` makes of the answer.

    Errors of single pictures and of `present` are reported; the others go on. Returns the exit
    code.
    """
    report = Report(args)
    for reply in ask_each(args, ask):
        subject = picture_subject(args, reply.name, prompt)
        if isinstance(reply, Unread):
            report.failure(subject, reply.error)
            continue
        try:
            shown = present(reply)
        except PaliGemmaError as e:
            report.failure(subject, e, getattr(reply.answer, "text", None))
        else:
            report.answer(subject, shown)
    return report.exit_code


def report_together(
    args: argparse.Namespace,
    prompt: str,
    ask: Ask[A],
    present: Callable[[Answered[A]], Shown],
) -> int:
    """The same, asking once about all pictures at the same time; raises PaliGemmaError."""
    shown = present(ask_together(args, ask))
    Report(args).answer(Subject(None, {"files": args.pictures, "prompt": prompt}), shown)
    return 0


def print_json(document: dict[str, Any]) -> None:
    """One line, in letters that standard output can print."""
    print(json.dumps(document, ensure_ascii=not encodes_unicode()), flush=True)


def encodes_unicode() -> bool:
    """Whether standard output can print any letter."""
    return (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
