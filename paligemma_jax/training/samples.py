"""What a model in training answers to some records, drawn on their pictures."""

import dataclasses
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from paligemma_jax.answering.prompted_model import PromptedModel
from paligemma_jax.data.record import Record
from paligemma_jax.processing.detections import Detections
from paligemma_jax.processing.image_source import load_image
from paligemma_jax.processing.mask_codec import MaskCodec
from paligemma_jax.processing.parsing import parse_answer
from paligemma_jax.processing.segmentations import Segmentations
from paligemma_jax.viz.boxes import draw
from paligemma_jax.viz.drawing import INK, drawable, load_font

_PANEL, _MARGIN, _LINE, _LINES, _COLUMNS = 320, 8, 16, 6, 4
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_RIGHT, _WRONG = "#15803d", "#b91c1c"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A record and what the model answered; the record's own answers are `expected`."""

    record: Record
    answer: str

    @property
    def expected(self) -> tuple[str, ...]:
        return self.record.answers or (self.record.suffix,)

    @property
    def exact(self) -> bool:
        """Whether the answer is one of those expected, letter by letter."""
        return self.answer in self.expected


def answer_records(
    model: PromptedModel, records: Sequence[Record], max_new_tokens: int, batch_size: int
) -> list[Sample]:
    """Greedy answers to the prompts of the records."""
    made: list[Sample] = []
    by_count: dict[int, list[int]] = {}
    for place, record in enumerate(records):  # those of a batch have equally many pictures
        by_count.setdefault(len(record.images), []).append(place)
    answers: dict[int, str] = {}
    for count, places in by_count.items():
        chosen = [records[place] for place in places]
        said = model.generate(
            [list(record.images) for record in chosen] if count else None,
            [record.prefix for record in chosen],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        answers |= {place: one.text for place, one in zip(places, said, strict=True)}
    made += [Sample(record, answers[place]) for place, record in enumerate(records)]
    return made


def draw_samples(samples: Sequence[Sample], codec: MaskCodec | None = None) -> Image.Image:
    """One picture of all: each with the boxes and masks answered, prompt, answer and target."""
    height = _PANEL + (_LINES + 1) * _LINE
    columns = min(_COLUMNS, max(1, len(samples)))
    rows = -(-len(samples) // columns)
    width = columns * (_PANEL + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, max(1, rows) * height + _MARGIN), "white")
    for place, sample in enumerate(samples):
        x = _MARGIN + place % columns * (_PANEL + _MARGIN)
        y = _MARGIN + place // columns * height
        sheet.paste(_panel(sample, codec, height - _MARGIN), (x, y))
    return sheet


def _panel(sample: Sample, codec: MaskCodec | None, height: int) -> Image.Image:
    panel = Image.new("RGB", (_PANEL, height), "white")
    if sample.record.images:
        picture = _shrink(load_image(sample.record.images[0]))
        found = _objects(sample.answer, picture, codec)
        picture = draw(picture, found) if found is not None and len(found) else picture
        panel.paste(picture, ((_PANEL - picture.width) // 2, 0))
    pen, font = ImageDraw.Draw(panel), load_font(13)
    y = _PANEL + 2
    parts = [(sample.record.prefix, INK), (sample.answer, _RIGHT if sample.exact else _WRONG)]
    if not sample.exact:
        parts.append((sample.expected[0], _RIGHT))
    for text, colour in parts:
        for line in _wrapped(pen, drawable(font, text) or "(nothing)", font)[: _LINES // 2]:
            pen.text((0, y), line, colour, font=font)
            y += _LINE
    return panel


def _shrink(picture: Image.Image) -> Image.Image:
    scale = _PANEL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size)


def _objects(
    answer: str, picture: Image.Image, codec: MaskCodec | None
) -> Detections | Segmentations | None:
    parsed = parse_answer(answer)
    if not parsed.objects:
        return None
    if codec is not None and any(box.codes is not None for box in parsed.objects):
        return Segmentations.decoded(parsed, *picture.size, codec.decode)
    return Detections.from_answer(parsed, *picture.size)


def _wrapped(pen: ImageDraw.ImageDraw, text: str, font: Font) -> list[str]:
    lines, line = [], ""
    for character in text.replace("\n", " "):
        if pen.textlength(line + character, font=font) > _PANEL:
            lines.append(line)
            line = ""
        line += character
    return [*lines, line]
