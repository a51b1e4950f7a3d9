"""The same question about many pictures: read and answered in batches."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from paligemma_jax.cli.pictures import Picture, read_picture, read_together
from paligemma_jax.cli.progress import byte_bar, picture_bar, status
from paligemma_jax.errors import InvalidImageError

if TYPE_CHECKING:
    from paligemma_jax.generation.encoded import EncodedImages
    from paligemma_jax.pipeline import Pipeline
    from paligemma_jax.processing.processor import Entry

A = TypeVar("A")
Ask: TypeAlias = Callable[["Pipeline", list[Picture]], list[A]]  # an answer for each picture


@dataclasses.dataclass(frozen=True)
class Answered(Generic[A]):
    """A picture and the answer about it."""

    picture: Picture
    answer: A

    @property
    def name(self) -> str:
        """What the user called the picture."""
        return self.picture.name


@dataclasses.dataclass(frozen=True)
class Unread:
    """A picture that could not be read."""

    name: str
    error: InvalidImageError


def load_pipeline(args: argparse.Namespace) -> "Pipeline":
    """The model that the options ask for, with a progress bar where loading takes long."""
    from paligemma_jax.models.mesh import Axes
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
            mask_codec=getattr(args, "mask_codec", None),
            quantize=args.quantize,
            adapter=args.adapter,
            mesh=Axes(**args.mesh) if args.mesh else None,
            progress=progress,
        )


def ask_each(args: argparse.Namespace, ask: Ask[A]) -> Iterator[Answered[A] | Unread]:
    """Asks about each picture; the model is loaded once there is a picture to ask about.

    Raises CheckpointError and whatever `ask` does; a picture that cannot be read stops nothing.
    """
    pipeline: Pipeline | None = None
    names = list(enumerate(args.pictures))
    with picture_bar(args, len(names)) as progress:
        for start in range(0, len(names), args.batch_size):
            batch = [_read(name, args, i) for i, name in names[start : start + args.batch_size]]
            pictures = [picture for picture in batch if isinstance(picture, Picture)]
            answers: Iterator[A] = iter(())
            if pictures:
                pipeline = pipeline or load_pipeline(args)
                answers = iter(_answer(args, ask, pipeline, pictures))
            for picture in batch:
                progress(1)
                if isinstance(picture, Unread):
                    yield picture
                else:
                    yield Answered(picture, next(answers))


def ask_together(args: argparse.Namespace, ask: Ask[A]) -> Answered[A]:
    """Asks once about all pictures at the same time; raises PaliGemmaError."""
    together = read_together(args)
    return Answered(together, _answer(args, ask, load_pipeline(args), [together])[0])


def pictures_of(pipeline: "Pipeline", picture: Picture) -> "Entry | EncodedImages":
    """What a method of the pipeline takes; many frames are encoded some at a time."""
    if len(picture.images) == 1:
        return picture.image
    return pipeline.encode(picture.images)


def _read(name: str, args: argparse.Namespace, number: int) -> Picture | Unread:
    try:
        return read_picture(name, args, number)
    except InvalidImageError as e:
        return Unread(name, e)


def _answer(
    args: argparse.Namespace, ask: Ask[A], pipeline: "Pipeline", pictures: list[Picture]
) -> list[A]:
    message = "compiling and answering" if len(args.pictures) == 1 else None
    with status(args, message):
        return ask(pipeline, pictures)
