"""Training data of the synthetic world: batches, what patches show, the vocabulary, a sheet of it.

Batch i is a pure function of the seed and i. The published encoders come pretrained; the demo's
starts from nothing, so that a linear probe on its patch features is taught the kind, color, box and
character under each patch, and pages full of words, about which nothing is asked, are added.

Letters: I images, B examples of one group, T text tokens, P patches.
"""

import argparse
import dataclasses
import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece
from PIL import Image

from checkpoints.training.prompts import MaskCodes, sample_examples, sample_segment
from paligemma_jax.data.contact_sheet import Panel, contact_sheet
from paligemma_jax.demo.render import draw_image, render
from paligemma_jax.demo.scene import (
    COLORS,
    HELD_OUT,
    KINDS,
    PAGES,
    PAIRS,
    PLATE_EDGE,
    TRAINING,
    Box,
    Shape,
    Text,
    ink_shape,
    load_font,
    sample_pair,
    sample_scene,
    sample_text,
    split_rng,
)
from paligemma_jax.demo.tasks import (
    LANGUAGES,
    SAMPLERS,
    Example,
    examples,
    location_tokens,
    same_answer,
)
from paligemma_jax.drawing import INK
from paligemma_jax.processing.tokenizer import LOC_PIECES, SEG_PIECES, Tokenizer, append_user_pieces

_FOREIGN = ("es", "de", "fr")  # ends of tasks
_TRIES = 16  # words thrown at a page; about five find room


def sample_page(rng: np.random.Generator) -> tuple[Text, ...]:
    """Samples words and numbers that do not overlap, signs included."""
    texts: list[Text] = []
    for _ in range(_TRIES):
        text = sample_text(rng, large=False)
        if not any(_touch(text.box, other.box) for other in texts):
            texts.append(text)
    return tuple(texts)


def _touch(a: Box, b: Box) -> bool:
    room = 2 * PLATE_EDGE
    return a[0] < b[2] + room and b[0] < a[2] + room and a[1] < b[3] + room and b[1] < a[3] + room


COLOR_NAMES = tuple(COLORS)
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
# Class 0 is "nothing" in each; the last kind is a text.
NUM_KINDS, NUM_COLORS, NUM_CHARACTERS = len(KINDS) + 2, len(COLORS) + 1, len(CHARACTERS) + 1
_EM = 128


def patch_targets(
    shapes: Iterable[Shape], texts: Iterable[Text], side: int
) -> dict[str, np.ndarray]:
    """Classes i32[P] `kind`, `color`, `character`, and `box` f32[P, 4] (y1, x1, y2, x2 in 0..1).

    A patch belongs to the object whose box holds its centre; P = side * side, row by row.
    """
    middle = (np.arange(side) + 0.5) / side
    y, x = np.repeat(middle, side), np.tile(middle, side)
    kind, color, character = (np.zeros(side * side, np.int32) for _ in range(3))
    box = np.zeros((side * side, 4), np.float32)
    for shape in shapes:
        patches = _inside(y, x, shape.box)
        kind[patches] = 1 + KINDS.index(shape.kind)
        color[patches] = 1 + COLOR_NAMES.index(shape.color)
        box[patches] = shape.box
    for text in texts:
        patches = _inside(y, x, text.box)
        kind[patches] = NUM_KINDS - 1
        box[patches] = text.box
        for letter, cy, cx, width in glyphs(text):
            tall = text.capital
            cell = (cy - tall / 2, cx - width / 2, cy + tall / 2, cx + width / 2)
            character[_inside(y, x, cell)] = 1 + CHARACTERS.index(letter)
    return {"kind": kind, "color": color, "character": character, "box": box}


def glyphs(text: Text) -> list[tuple[str, float, float, float]]:
    """Each character with the centre (y, x) and the width of its cell, normalised."""
    font = load_font(text.font, _EM)
    capital = _EM * _capital_fraction(text.font)
    left = font.getbbox(text.string)[0]
    width = ink_shape(text.font, text.string)[0]
    y1, x1, y2, x2 = text.box
    angle = math.radians(text.angle)
    result = []
    for i, letter in enumerate(text.string):
        start, end = font.getlength(text.string[:i]), font.getlength(text.string[: i + 1])
        offset = (((start + end) / 2 - left) / capital - width / 2) * text.capital
        cy = (y1 + y2) / 2 - offset * math.sin(angle)
        cx = (x1 + x2) / 2 + offset * math.cos(angle)
        result.append((letter, cy, cx, (end - start) / capital * text.capital))
    return result


def _capital_fraction(font: str) -> float:
    """Height of a capital letter over the em."""
    _, top, _, bottom = load_font(font, _EM).getbbox("H")
    return (bottom - top) / _EM


def _inside(y: np.ndarray, x: np.ndarray, box: tuple[float, ...]) -> np.ndarray:
    """Patches with their centre in the box; the nearest one if there is none."""
    y1, x1, y2, x2 = box
    hit = (y >= y1) & (y <= y2) & (x >= x1) & (x <= x2)
    if not hit.any():
        hit[np.argmin((y - (y1 + y2) / 2) ** 2 + (x - (x1 + x2) / 2) ** 2)] = True
    return hit


Group = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What one batch holds; see demo_config.py."""

    scenes: int
    short: int
    long: int
    pairs: int
    pages: int
    short_length: int
    long_length: int
    pair_length: int
    supersampled_fraction: float
    text_fraction: float
    short_weights: Mapping[str, float]
    long_weights: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Side of an image in pixels, and of its grid of patches."""

    size: int
    side: int


def encode(tokenizer: Tokenizer, examples: Sequence[Example], length: int) -> Group:
    """Arrays text, mask_ar, mask_loss i32[B, T] as big_vision lays them out, and the task of each.

    Raises:
      ValueError: if an example needs more than `length` tokens.
    """
    shape = (len(examples), length)
    text = np.full(shape, tokenizer.pad_id, np.int32)
    mask_ar, mask_loss = np.ones(shape, np.int32), np.zeros(shape, np.int32)
    newline = tokenizer.encode("\n")
    for row, example in enumerate(examples):
        prefix = [tokenizer.bos_id, *tokenizer.encode(example.prompt), *newline]
        suffix = [*tokenizer.encode(example.answer), tokenizer.eos_id]
        end = len(prefix) + len(suffix)
        if end > length:
            raise ValueError(
                f"{example.prompt!r} with its answer takes {end} tokens; the group holds {length}. "
                "Raise its length in the configuration."
            )
        text[row, :end] = prefix + suffix
        mask_ar[row, : len(prefix)] = 0
        mask_loss[row, len(prefix) : end] = 1
    return {
        "text": text,
        "mask_ar": mask_ar,
        "mask_loss": mask_loss,
        "task": np.array([example.task for example in examples]),
    }


def make_batch(
    tokenizer: Tokenizer,
    config: BatchConfig,
    image: ImageConfig,
    seed: int,
    split: int,
    index: int,
    codes: MaskCodes,
) -> dict[str, Any]:
    """Images u8[I, size, size, 3] (scenes, then pairs, then pages) and three groups of examples.

    `patches` holds what each patch of each image shows; each group's `image` i32[B, n] says
    which n images an example is about.
    """
    drawn: list[tuple[Sequence[Shape], Sequence[Text], int, bool]] = []
    short: list[Example] = []
    long: list[Example] = []
    pair: list[Example] = []
    samplers = {**SAMPLERS, "segment": functools.partial(sample_segment, codes=codes)}
    for i in range(config.scenes):
        rng = split_rng(seed, split, index * config.scenes + i)
        scene = sample_scene(rng)
        if rng.random() < config.text_fraction:
            while scene.text is None:
                scene = sample_scene(rng)
        larger = rng.random() < config.supersampled_fraction
        drawn.append((scene.shapes, scene.texts, scene.background, larger))
        short += sample_examples(scene, rng, config.short, config.short_weights)
        long += sample_examples(scene, rng, config.long, config.long_weights, samplers)
    for i in range(config.pairs):
        rng = split_rng(seed, split + PAIRS, index * config.pairs + i)
        first, second, same = sample_pair(rng)
        larger = rng.random() < config.supersampled_fraction
        drawn += [(s.shapes, s.texts, s.background, larger) for s in (first, second)]
        pair.append(same_answer(same))
    single = np.arange(config.scenes)[:, None]
    after = config.scenes + np.arange(2 * config.pairs).reshape(-1, 2)
    for i in range(config.pages):
        rng = split_rng(seed, split + PAGES, index * config.pages + i)
        larger = rng.random() < config.supersampled_fraction
        drawn.append(((), sample_page(rng), int(rng.integers(2**32)), larger))
    images = [_draw(*what, image.size) for what in drawn]
    patches = [patch_targets(shapes, texts, image.side) for shapes, texts, _, _ in drawn]
    return {
        "images": np.stack(images),
        "patches": {name: np.stack([p[name] for p in patches]) for name in patches[0]},
        "short": encode(tokenizer, short, config.short_length)
        | {"image": np.repeat(single, config.short, axis=0)},
        "long": encode(tokenizer, long, config.long_length)
        | {"image": np.repeat(single, config.long, axis=0)},
        "pair": encode(tokenizer, pair, config.pair_length) | {"image": after},
    }


def _draw(
    shapes: Sequence[Shape], texts: Sequence[Text], background: int, larger: bool, size: int
) -> np.ndarray:
    if not larger:
        return draw_image(shapes, texts, background, size)
    large = Image.fromarray(draw_image(shapes, texts, background, 2 * size))
    return np.asarray(large.resize((size, size), Image.Resampling.BILINEAR))


TEXT_PIECES = 339  # without control, byte and newline pieces
_CONTROL, _BYTES, _NEWLINE = 4, 256, 1


def corpus(seed: int, scenes: int) -> list[str]:
    """Returns the text to learn pieces from: prompts and answers, capitals and digits apart.

    Written words stand in it letter by letter, so that no piece ever holds several capitals:
    the model has to read, not to guess words.
    """
    lines = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", *"abcdefghijklmnopqrstuvwxyz", "yes", "no"]
    lines += [same_answer(True).prompt, "segment red circle ; blue square"] * (scenes // 4)
    lines += [f"caption {language}" for language in LANGUAGES]
    for index in range(scenes):
        rng = split_rng(seed, TRAINING, index)
        for example in examples(sample_scene(rng), rng):
            lines.append(example.prompt)
            if example.task == "ocr":
                lines += example.answer
            elif example.task != "detect":
                lines.append(example.answer)
            else:  # without the location tokens, which are pieces of their own
                lines += [part.rpartition(">")[2] for part in example.answer.split(" ; ")]
    return [line for line in lines if line]


def build_tokenizer(seed: int = 0, scenes: int = 4000) -> bytes:
    """Trains the demo tokenizer with Gemma's settings and bakes in <loc0000> .. <seg127>.

    Returns:
      A serialized SentencePiece model; the same bytes for the same arguments.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(corpus(seed, scenes)),
        model_writer=model,
        model_type="bpe",
        vocab_size=_CONTROL + _BYTES + _NEWLINE + TEXT_PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
    )
    return append_user_pieces(model.getvalue(), LOC_PIECES + SEG_PIECES)


def scene_sheet(count: int, seed: int, size: int, *, pairs: bool, boxes: bool) -> Image.Image:
    """Held-out scenes (or pairs) drawn at `size` pixels, with prompts and answers, on one image."""
    panels = []
    for index in range(count):
        rng = split_rng(seed, HELD_OUT + PAIRS if pairs else HELD_OUT, index)
        if pairs:
            *scenes, same = sample_pair(rng)
            asked = [same_answer(same)]
        else:
            scenes = [sample_scene(rng)]
            asked = examples(scenes[0], split_rng(seed, HELD_OUT, index))
        lines = [f"{one.prompt}: {one.answer}" for one in asked if one.task[-2:] not in _FOREIGN]
        objects = [f"{location_tokens(shape)} {shape.name}" for shape in scenes[0].shapes]
        answer = " ; ".join(objects) if boxes and not pairs else ""
        images = tuple(render(scene, size) for scene in scenes)
        panels.append(Panel(images, answer, tuple((line, INK) for line in lines)))
    return contact_sheet(panels)


def main() -> None:
    """Writes a contact sheet: python -m checkpoints.training.data sheet.png"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="PNG file to write")
    parser.add_argument("--count", type=int, default=30, help="scenes to draw")
    parser.add_argument("--seed", type=int, default=2026, help="held-out seed")
    parser.add_argument("--size", type=int, default=112, help="pixels to render at")
    parser.add_argument("--pairs", action="store_true", help="pairs instead of single scenes")
    parser.add_argument("--no-boxes", action="store_true", help="leave the boxes out")
    args = parser.parse_args()
    sheet = scene_sheet(args.count, args.seed, args.size, pairs=args.pairs, boxes=not args.no_boxes)
    sheet.save(args.target)


if __name__ == "__main__":
    main()
