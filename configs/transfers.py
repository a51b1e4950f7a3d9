"""The published transfers of PaliGemma and their hyperparameters.

From big_vision's configs/proj/paligemma/transfers and PaliGemma (arXiv 2407.07726), appendix J.
All: Adam (b2 0.999), gradients clipped to 1.0, cosine with 5 % warm-up, every weight trained unless
the table freezes the image encoder. PaliGemma 2 used the same and smaller learning rates; see
configs/base.py.

    paligemma train --config transfers:task=cococap,data=DIR,resolution=448 --workdir DIR

Arguments:
  task         a name of `TRANSFERS` below
  data         prepared data set of tensorflow-datasets (the directory of its version, in
               array_record files), or JSON lines; the task's below `root` if not given
  root         where tensorflow-datasets keeps data; ~/tensorflow_datasets if not given
  resolution   224, 448 or 896
  version, size  of the model: 1 (PaliGemma, the default), or 2 with 3b, 10b, 28b
  final_split  train on validation records too, as the published numbers did
  freeze_vit   freezes the image encoder; freeze_vit=False does not; as the table says if not given
  model        any other checkpoint

Prompts, columns, splits and directories are in paligemma_jax/data/tasks.py. They were checked
against the builders of big_vision's datasets/ and of tensorflow-datasets (coco_captions). The
directory is what tfds makes of the builder's class, which is not always the name that big_vision's
configuration gives. No builder is public of nlvr2, ocrvqa (columns and splits are those that
big_vision's configurations name) and of the videos (frames are given as "images", of JSON lines or
a data set of one's own, with "captions", or "question" and "answer").

Other columns are set with, for example, --config.train.reader.answers=labels. RefCOCO's masks are
encoded by the checkpoint's mask codec; of a .jsonl file, prefix and suffix are taken as they are.

Unlike there, images are always made smaller with antialias. big_vision had none in cococap,
coco35l, textcaps, scicap, screen2words, gqa, nlvr2, science_qa, refcoco_seg, pope and the videos.
"""

import dataclasses
import functools
from collections.abc import Mapping

from ml_collections import ConfigDict

from paligemma_jax.data.object_readers import CycleObjects, Outlined, Referring
from paligemma_jax.data.readers import Fields, Reader, ShuffleOptions
from paligemma_jax.data.record import Transform
from paligemma_jax.data.tasks import TASKS, TaskReader
from paligemma_jax.data.transforms import CycleAnswers, LowerCase, RandomAnswer
from paligemma_jax.errors import ConfigError
from paligemma_jax.training.config import Data, load_config, parse_arg
from paligemma_jax.training.optimizer import SGD, Adam, Epochs, Examples, Fraction, Optimizer, Steps

LANGUAGES = (
    "ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fil", "fr", "he", "hi", "hr", "hu",
    "id", "it", "ja", "ko", "mi", "nl", "no", "pl", "pt", "ro", "ru", "sv", "sw", "te", "th", "tr",
    "uk", "vi", "zh",
)  # fmt: skip  # of COCO-35L


@dataclasses.dataclass(frozen=True)
class Best:
    """What was best at one resolution."""

    epochs: float
    learning_rate: float
    weight_decay: float
    batch_size: int = 256
    freeze_vit: bool = False
    dropout: float | None = None


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The best hyperparameters of a task by resolution, and what all resolutions share.

    Attributes:
      transforms: each answer in turn is big_vision's choice_no_replacement.
      label_smoothing, dropout: of the loss; in the language model.
      examples: what one epoch counts for, where it is not the data's size.
      task: its name in `paligemma_jax.data.tasks`, if it is another.
    """

    best: Mapping[int, Best]
    transforms: tuple[Transform, ...] = (CycleAnswers(),)
    label_smoothing: float = 0.0
    dropout: float = 0.0
    optimizer: Optimizer = Adam()
    examples: int | None = None
    task: str = ""


def both(epochs: float, rate: float, decay: float, batch: int = 256) -> dict[int, Best]:
    """The same at 224 and 448 pixels."""
    return {size: Best(epochs, rate, decay, batch) for size in (224, 448)}


LOWER = (CycleAnswers(), LowerCase(prefix=False))
RANDOM = (RandomAnswer(),)
SCENE_TEXT = {
    224: Best(3, 1e-5, 1e-6), 448: Best(3, 1e-5, 1e-6, 128), 896: Best(3, 3e-6, 3e-7, 32),
}  # fmt: skip

TRANSFERS: dict[str, Transfer] = {
    # Captions.
    "cococap": Transfer(both(5, 1e-5, 1e-6)),
    "coco35l": Transfer(both(5, 1e-5, 1e-6), examples=566_435),
    "textcaps": Transfer(both(5, 1e-5, 1e-6), LOWER),
    "scicap": Transfer(both(80, 3e-5, 0.0), label_smoothing=0.1, dropout=0.1),
    "screen2words": Transfer(both(10, 1e-5, 0.0), label_smoothing=0.2, dropout=0.3),
    "widgetcap": Transfer(both(4, 3e-6, 3e-7, 64), label_smoothing=0.1, dropout=0.1),
    # Questions.
    "vqav2": Transfer({224: Best(10, 1e-5, 1e-6), 448: Best(10, 1e-5, 0.0)}),
    "okvqa": Transfer(both(10, 5e-6, 0.0, 128)),
    "aokvqa_da": Transfer(both(10, 5e-6, 0.0, 128)),
    "aokvqa_mc": Transfer(both(15, 5e-6, 0.0, 128)),
    "ai2d": Transfer(both(10, 1e-5, 1e-6)),
    "gqa": Transfer({224: Best(1, 1e-5, 0.0), 448: Best(1, 1e-5, 0.0, freeze_vit=True)}),
    "nlvr2": Transfer({224: Best(3, 1e-5, 1e-6), 448: Best(10, 3e-6, 3e-7)}),
    "science_qa": Transfer(
        {size: Best(20, 1e-5, 0.0, 128, freeze_vit=True) for size in (224, 448)},
        (ShuffleOptions(),),
    ),
    "rsvqa_lr": Transfer(both(3, 3e-6, 0.0), LOWER, label_smoothing=0.2),
    "rsvqa_hr": Transfer(both(1, 1e-5, 0.0), LOWER),
    "chartqa": Transfer(
        {size: Best(30, 1e-5, 1e-6) for size in (224, 448, 896)}, label_smoothing=0.2, dropout=0.1
    ),
    "vizwizvqa": Transfer(both(10, 1e-5, 0.0)),
    "tallyqa": Transfer(
        {224: Best(2, 1e-5, 0.0), 448: Best(2, 1e-5, 1e-6), 896: Best(2, 7e-6, 7e-7)}
    ),
    "ocrvqa": Transfer({
        224: Best(3, 3e-6, 0.0, 128), 448: Best(3, 3e-6, 0.0, 128), 896: Best(3, 1e-5, 0.0, 128),
    }),
    "textvqa": Transfer(
        {224: Best(5, 3e-6, 0.0), 448: Best(10, 3e-6, 3e-7), 896: Best(10, 3e-6, 0.0)}
    ),
    "docvqa": Transfer({size: Best(10, 1e-5, 1e-6) for size in (224, 448, 896)}, RANDOM),
    "infovqa": Transfer(SCENE_TEXT, LOWER, label_smoothing=0.4),
    "stvqa": Transfer(SCENE_TEXT, LOWER, label_smoothing=0.1),
    # big_vision takes no step here and only measures; epochs and learning rate are ours.
    "pope": Transfer(both(1, 1e-5, 0.0)),
    # Masks.
    "refcoco_seg": Transfer(
        {224: Best(100, 3e-5, 0.0, dropout=0.1), 448: Best(100, 1e-5, 0.0),
         896: Best(100, 1e-5, 0.0, 64)},
        (CycleObjects(), CycleAnswers()), label_smoothing=0.3,
    ),
    # Videos, as several images: frames of a stride of 30, 70, 9, 9, 26, 7.
    "activitynet_cap": Transfer({224: Best(1, 1e-5, 1e-6, 128, freeze_vit=True)}, RANDOM),
    "activitynet_qa": Transfer({224: Best(1, 1e-5, 1e-6, 128)}),
    "msrvtt_cap": Transfer({224: Best(20, 1e-5, 0.0, 128, freeze_vit=True)}, RANDOM),
    "msrvtt_qa": Transfer({224: Best(1, 1e-5, 0.0, 128, freeze_vit=True)}),
    "msvd_qa": Transfer({224: Best(1, 3e-6, 3e-7, 128)}),
    "vatex_cap": Transfer({224: Best(10, 3e-6, 3e-7, 128)}, RANDOM),
    # big_vision's two of 100 long captions, in JSON lines.
    "longcap100": Transfer({224: Best(15, 1e-5, 3e-7, 32)}),
    "longcap100_l4": Transfer({224: Best(1, 0.1, 0.0, 4)}, optimizer=SGD(), task="longcap100"),
}  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    parse = functools.partial(
        parse_arg, arg, task="", data="", root="~/tensorflow_datasets", resolution=224, version=1,
        size="3b", final_split=False, model="",
    )  # fmt: skip
    args = parse(freeze_vit=False)
    if args.task not in TRANSFERS:
        raise ConfigError(
            f"There is no transfer {args.task!r}. The transfers are {', '.join(TRANSFERS)}. Write "
            "for example: --config transfers:task=vqav2"
        )
    transfer = TRANSFERS[args.task]
    task = TASKS[transfer.task or args.task]
    best = transfer.best.get(args.resolution) or transfer.best[max(transfer.best)]
    freeze = parse(freeze_vit=best.freeze_vit).freeze_vit
    names = dict(model=args.model, version=args.version, size=args.size, resolution=args.resolution)
    config = load_config("base:" + ",".join(f"{name}={value}" for name, value in names.items()))

    reader: Reader = TaskReader(task.name)
    masks = task.name == "refcoco_seg" and not args.data.endswith(".jsonl")
    if task.name == "widgetcap":
        reader = Outlined(reader, size=args.resolution)
    if task.name == "refcoco_seg":
        reader = Referring() if masks else Fields()
    paths = (
        [args.data] if args.data else [f"{args.root}/{name}" for name in task.directories.split()]
    )
    split = task.final if args.final_split else task.train
    train = [Data(path, split, reader, masks=masks) for path in paths]
    if task.name == "coco35l":
        train = [Data(paths[0], f"train_{language}", reader) for language in LANGUAGES]

    with config.unlocked():
        config.train = tuple(train) if len(train) > 1 else train[0]
        config.validation = Data(paths[0], task.validation, reader, masks=masks)
        config.transforms = transfer.transforms
        config.text_length = task.text_length
        config.sample_max_new_tokens = task.text_length
        config.batch_size = best.batch_size
        config.duration = Epochs(best.epochs)
        if transfer.examples:
            config.duration = Examples(best.epochs * transfer.examples)
        config.learning_rate = best.learning_rate
        config.optimizer = transfer.optimizer
        config.weight_decay = best.weight_decay
        config.trainable = "llm/.*" if freeze else None
        config.label_smoothing = transfer.label_smoothing
        config.dropout = transfer.dropout if best.dropout is None else best.dropout
        config.checkpoint_every = Steps(1000)
        config.evaluate_every = Fraction(0.1)
    return config
