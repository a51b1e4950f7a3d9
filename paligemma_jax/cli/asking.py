"""One prompt about many pictures: read and answered in batches."""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from paligemma_jax.cli.pictures import Picture, read_picture
from paligemma_jax.cli.progress import byte_bar, picture_bar, status
from paligemma_jax.errors import InvalidImageError

if TYPE_CHECKING:
    from PIL import Image

    from paligemma_jax.generation.sampling import Sampler
    from paligemma_jax.pipeline import Generation, Pipeline


@dataclasses.dataclass(frozen=True)
class Answered:
    """A picture and the model's answer about it."""

    name: str
    image: "Image.Image"
    answer: "Generation"


@dataclasses.dataclass(frozen=True)
class Unread:
    """A picture that could not be read."""

    name: str
    error: InvalidImageError


def load_pipeline(args: argparse.Namespace) -> "Pipeline":
    """The model that the options ask for, with a progress bar where loading takes long."""
    from paligemma_jax.pretrained import from_pretrained
    from paligemma_jax.resolve import DEMO

    # In float32 the demo model compiles and answers sooner on CPUs.
    dtype = args.dtype or ("float32" if args.model == DEMO else "bfloat16")
    with byte_bar(args, f"loading {args.model}") as progress:
        return from_pretrained(
            args.model,
            dtype=dtype,
            resolution=args.resolution,
            tokenizer=args.tokenizer,
            progress=progress,
        )


def ask_each(args: argparse.Namespace, prompt: str) -> Iterator[Answered | Unread]:
    """Asks the same about each picture; the model is loaded once there is a picture to ask about.

    Raises CheckpointError, InvalidPromptError; a picture that cannot be read stops nothing.
    """
    pipeline: Pipeline | None = None
    with picture_bar(args, len(args.pictures)) as progress:
        for start in range(0, len(args.pictures), args.batch_size):
            batch = [_read(name, args) for name in args.pictures[start : start + args.batch_size]]
            images = [picture.image for picture in batch if isinstance(picture, Picture)]
            answers: Iterator[Generation] = iter(())
            if images:
                pipeline = pipeline or load_pipeline(args)
                answers = iter(_generate(pipeline, args, images, [prompt] * len(images)))
            for picture in batch:
                progress(1)
                if isinstance(picture, Unread):
                    yield picture
                else:
                    yield Answered(picture.name, picture.image, next(answers))


def ask_together(args: argparse.Namespace, prompt: str) -> "Generation":
    """Asks once about all pictures at the same time; raises PaliGemmaError."""
    images = [read_picture(name, args).image for name in args.pictures]
    return _generate(load_pipeline(args), args, [images], [prompt])[0]


def _read(name: str, args: argparse.Namespace) -> Picture | Unread:
    try:
        return read_picture(name, args)
    except InvalidImageError as e:
        return Unread(name, e)


def _generate(
    pipeline: "Pipeline", args: argparse.Namespace, images: Sequence, prompts: Sequence[str]
) -> "list[Generation]":
    message = "compiling and answering" if len(args.pictures) == 1 else None
    with status(args, message):
        return pipeline.generate(
            images,
            prompts,
            max_new_tokens=args.max_new_tokens,
            sampler=_sampler(getattr(args, "temperature", 0.0)),
            seed=getattr(args, "seed", 0),
            batch_size=args.batch_size,
        )


def _sampler(temperature: float) -> "Sampler":
    from paligemma_jax.generation.sampling import Greedy, Temperature

    return Temperature(temperature=temperature) if temperature else Greedy()
