"""Seven questions about a GPU whose answers decide how generation is written.

    python -m paligemma_jax.benchmark.gpu_questions --json answers.json

Needs jax and numpy only. Takes under three minutes on an H200; a question that fails, or for which
no time is left, says so and the others go on. `--tiny` is for trying it, on any machine.
"""

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from paligemma_jax.benchmark.device_answers import TINY, Answer, Question, Sizes
from paligemma_jax.benchmark.device_attention import cudnn_attention
from paligemma_jax.benchmark.device_copies import copies_to_the_device
from paligemma_jax.benchmark.device_decoding import cost_of_a_kernel, ways_to_loop
from paligemma_jax.benchmark.device_products import chosen_library, eight_bit_floats, four_bits

HEAD = ("| question | case | value | seen |", "|---|---|---|---|")  # of the table
QUESTIONS: dict[str, Question] = {
    "a": cost_of_a_kernel,
    "d": ways_to_loop,
    "c": cudnn_attention,
    "g": copies_to_the_device,
    "f": eight_bit_floats,
    "b": chosen_library,
    "e": four_bits,
}


def ask(names: Sequence[str], sizes: Sizes, seconds: float) -> list[Answer]:
    """Answers to the questions of these letters, in turn, until the time is over."""
    answers: list[Answer] = []
    start = time.monotonic()
    for name in names:
        began = time.monotonic()
        try:
            for answer in QUESTIONS[name](sizes):
                answers.append(answer)
                print(_line(answer), file=sys.stderr, flush=True)
                if time.monotonic() - start > seconds:
                    answers.append(Answer(name, "the rest", None, "", "no time was left"))
                    break
        except Exception as e:  # one question must not cost the others their answers
            answers.append(Answer(name, "all", None, "", f"{type(e).__name__}: {e}"[:160]))
        took = time.monotonic() - began
        answers.append(Answer(name, "time to find out", round(took, 1), "s"))
    return answers


def markdown(answers: Sequence[Answer]) -> str:
    """The answers as a table."""
    return "\n".join([*HEAD, *(_line(answer) for answer in answers)])


def _line(answer: Answer) -> str:
    value = "-" if answer.value is None else f"{answer.value:.4g} {answer.unit}"
    note = answer.note.replace("|", "/")
    return f"| {answer.question} | {answer.case} | {value} | {note} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the answers")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the questions")
    parser.add_argument("--seconds", type=float, default=170.0, help="when to stop")
    parser.add_argument("--questions", default="".join(QUESTIONS), help="letters, e.g. ad")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.questions) - set(QUESTIONS))
    if unknown:
        parser.error(f"no question {unknown[0]!r}; there are {''.join(sorted(QUESTIONS))}")
    device = jax.devices()[0]
    about = {
        "device": getattr(device, "device_kind", str(device)),
        "platform": device.platform,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(about), file=sys.stderr, flush=True)
    answers = ask(options.questions, TINY if options.tiny else Sizes(), options.seconds)
    found = {**about, "answers": [dataclasses.asdict(answer) for answer in answers]}
    print(markdown(answers))
    print(json.dumps(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
