"""Answers in words: asked for as the options say, and shown."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paligemma_jax.cli.choosing import sampler_of
from paligemma_jax.cli.report import Shown

if TYPE_CHECKING:
    from paligemma_jax.answering.generation import BeamGeneration, Generation
    from paligemma_jax.answering.questions import Pictures
    from paligemma_jax.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Answers:
    """To one prompt: one, or as many as were drawn or searched for, best first."""

    ranked: "Sequence[Generation | BeamGeneration]"
    pieces: Sequence[str] = ()  # of the best one's tokens, to be shown with their logprobs


def ask_in_words(
    args: argparse.Namespace,
    pipeline: "Pipeline",
    images: "Sequence[Pictures] | None",
    prompts: Sequence[str],
    numbers: Sequence[int],
) -> list[Answers]:
    """Answers to each prompt; prompt i draws from the seed of the options + numbers[i]."""
    shared: dict[str, Any] = dict(
        max_new_tokens=args.max_new_tokens,
        beginnings=[args.begin] * len(prompts) if args.begin else None,
        batch_size=args.batch_size,
    )
    ranked: Sequence[Sequence[Generation | BeamGeneration]]
    if args.beams:
        ranked = pipeline.beam_search(
            images,
            prompts,
            beams=args.beams,
            alpha=args.alpha or 0.0,
            answers=args.beams if args.json else 1,  # one is found sooner
            **shared,
        )
        return list(map(Answers, ranked))
    shared |= dict(
        min_new_tokens=args.min_new_tokens,
        sampler=sampler_of(args),
        seed=[args.seed + number for number in numbers],
        stop=args.stop,
    )
    if args.best_of:
        alpha = args.alpha or 0.0
        ranked = pipeline.best_of(images, prompts, samples=args.best_of, alpha=alpha, **shared)
    else:
        ranked = [[answer] for answer in pipeline.generate(images, prompts, **shared)]
    if not args.logprobs:
        return list(map(Answers, ranked))
    piece = pipeline.processor.tokenizer.piece
    return [Answers(row, [piece(token) for token in row[0].tokens]) for row in ranked]


def show_in_words(args: argparse.Namespace, answers: Answers) -> Shown:
    """The best answer, and for programs all."""
    best = answers.ranked[0]
    lines = [best.text]
    if answers.pieces:
        logprobs = getattr(best, "logprobs", ())
        lines += [f"{p:.4f} {piece}" for p, piece in zip(logprobs, answers.pieces, strict=True)]
    fields = _fields(args, best)
    if args.begin:
        fields |= {"begin": args.begin}
    if args.best_of or args.beams:
        fields |= {"answers": [_fields(args, answer) for answer in answers.ranked]}
    return "\n".join(lines), fields


def plain_fields(answer: "Generation | BeamGeneration") -> dict[str, Any]:
    """What is said of every answer."""
    return {"answer": answer.text, "tokens": list(answer.tokens), "logprob": answer.logprob}


def _fields(args: argparse.Namespace, answer: "Generation | BeamGeneration") -> dict[str, Any]:
    from paligemma_jax.generation.ranking import answer_score

    fields = plain_fields(answer)
    if args.best_of or args.beams:
        fields["score"] = answer_score(answer.logprob, len(answer.tokens), args.alpha or 0.0)
    if args.logprobs:
        fields["logprobs"] = list(getattr(answer, "logprobs", ()))
    if args.stop:
        fields["stop"] = getattr(answer, "stop", None)
    return fields
