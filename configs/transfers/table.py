"""The published transfers of PaliGemma and their hyperparameters, one row each.

From big_vision's configs/proj/paligemma/transfers and PaliGemma (arXiv 2407.07726), appendix J.
All: Adam (b2 0.999), gradients clipped to 1.0, cosine with 5 % warm-up, every weight trained unless
the row freezes the image encoder. PaliGemma 2 used the same and smaller learning rates; see
configs/base.py.

    paligemma train --config transfers/cococap:data=DIR,resolution=448 --workdir DIR

Arguments:
  data         prepared data set of tensorflow-datasets (the directory of its version, in
               array_record files), or JSON lines; the row's below `root` if not given
  root         where tensorflow-datasets keeps data; ~/tensorflow_datasets if not given
  resolution   224, 448 or 896
  version, size  of the model: 1 (PaliGemma, the default), or 2 with 3b, 10b, 28b
  final_split  train on validation records too, as the published numbers did
  freeze_vit   whether the image encoder is frozen, as the row says if not given
  model        any other checkpoint

Columns, splits and directories were checked against the builders of big_vision's datasets/ (each
one of this table but those below) and of tensorflow-datasets (coco_captions). The directory is
what tfds makes of the builder's class, which is not always the name that big_vision's configuration
gives: a_ok_vqa, chart_qa, doc_vqa, ok_vqa, tally_qa, text_vqa, viz_wiz_vqa, pope/pope_random. No
builder is public of

  nlvr2, ocrvqa  columns and splits are those that big_vision's configurations name
  the videos     big_vision's reader was not released; frames are given as "images", of JSON lines
                 or a data set of one's own, with "captions", or "question" and "answer"

Other columns are set with, for example, --config.train.reader.answers=labels. RefCOCO's masks are
encoded by the checkpoint's mask codec; of a .jsonl file, prefix and suffix are taken as they are.

Unlike there, pictures are always made smaller with antialias. big_vision had none in cococap,
coco35l, textcaps, scicap, screen2words, gqa, nlvr2, science_qa, refcoco_seg, pope and the videos.
"""

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from paligemma_jax.data.readers import (
    Caption,
    CycleObjects,
    Fields,
    MultipleChoice,
    Outlined,
    QuestionAnswer,
    Reader,
    Referring,
    ScienceQuestion,
    ShuffleOptions,
)
from paligemma_jax.data.record import Transform
from paligemma_jax.data.transforms import CycleAnswers, LowerCase, RandomAnswer
from paligemma_jax.errors import ConfigError
from paligemma_jax.training.config import Data, load_config, parse_arg
from paligemma_jax.training.optimizer import SGD, Adam, Epochs, Examples, Method, Share, Steps

LANGUAGES = (
    "ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fil", "fr", "he", "hi", "hr", "hu",
    "id", "it", "ja", "ko", "mi", "nl", "no", "pl", "pt", "ro", "ru", "sv", "sw", "te", "th", "tr",
    "uk", "vi", "zh",
)  # fmt: skip  # of COCO-35L


@dataclasses.dataclass(frozen=True)
class Best:
    """What was best at one resolution."""

    epochs: float
    rate: float
    decay: float
    batch: int = 256
    freeze_vit: bool = False
    dropout: float | None = None


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A task: its data, how rows become records, and the best hyperparameters by resolution.

    Attributes:
      data: directories below ~/tensorflow_datasets, with a space between.
      split, final: of training; of the published numbers, which train on validation data too.
      transforms: each answer in turn is big_vision's choice_no_replacement.
      smoothing, dropout: of labels; in the language model.
      measure: metric, and how answers were decoded if not greedily.
    """

    data: str
    split: str
    final: str
    validation: str
    reader: Reader
    length: int
    best: Mapping[int, Best]
    measure: str
    transforms: tuple[Transform, ...] = (CycleAnswers(),)
    smoothing: float = 0.0
    dropout: float = 0.0
    method: Method = Adam()
    examples: int | None = None  # that one epoch counts for, where it is not the data's size


def both(epochs: float, rate: float, decay: float, batch: int = 256) -> dict[int, Best]:
    """The same at 224 and 448 pixels."""
    return {size: Best(epochs, rate, decay, batch) for size in (224, 448)}


ASK = QuestionAnswer("image", "question", "answer")
ASK_ANY = QuestionAnswer("image", "question", "answers")
ASK_VIDEO = QuestionAnswer("images", "question", "answer")
TELL_VIDEO = Caption("images", "captions")
LOWER = (CycleAnswers(), LowerCase(prefix=False))

TRANSFERS: dict[str, Transfer] = {
    # Captions.
    "cococap": Transfer(
        "coco_captions/2014/1.1.0", "train[:98%]+restval", "train+restval", "val",
        Caption("image", "captions.text"), 32,
        both(5, 1e-5, 1e-6), "CIDEr, beam of 2",
    ),
    "coco35l": Transfer(
        "coco35l/1.0.0", "train_en", "train_en", "dev_en", Caption("image", "captions"), 32,
        both(5, 1e-5, 1e-6), "CIDEr by language", examples=566_435,
    ),
    "textcaps": Transfer(
        "text_caps/1.0.0", "train[:98%]", "train", "val", Caption("image", "texts"), 32,
        both(5, 1e-5, 1e-6), "CIDEr, beam of 3", LOWER,
    ),
    "scicap": Transfer(
        "scicap/first_sentence_subfig_no/1.0.0", "train", "train+val", "val",
        Caption("image", "caption/lowercase_and_token_and_remove_figure_index"), 96,
        both(80, 3e-5, 0.0), "CIDEr and BLEU-4", smoothing=0.1, dropout=0.1,
    ),
    "screen2words": Transfer(
        "screen2_words/1.0.0", "train", "train+dev", "dev", Caption("image", "summary"), 24,
        both(10, 1e-5, 0.0), "CIDEr", smoothing=0.2, dropout=0.3,
    ),
    "widgetcap": Transfer(
        "widgetcap/1.0.0", "train", "train+dev", "dev",
        Outlined(Caption("image", "texts"), 224), 32,
        both(4, 3e-6, 3e-7, 64), "CIDEr", smoothing=0.1, dropout=0.1,
    ),
    # Questions.
    "vqav2": Transfer(
        "vqa/3.0.0", "train+validation[:-10240]", "train+validation", "validation[-10240:]",
        QuestionAnswer("image", "question_text", "answers"), 32,
        {224: Best(10, 1e-5, 1e-6), 448: Best(10, 1e-5, 0.0)}, "VQA accuracy",
    ),
    "okvqa": Transfer(
        "ok_vqa/1.0.0", "train[:-10%]", "train", "train[-10%:]",
        ASK_ANY, 32,
        both(10, 5e-6, 0.0, 128), "VQA accuracy",
    ),
    "aokvqa_da": Transfer(
        "a_ok_vqa/1.0.0", "train", "train+val", "val",
        QuestionAnswer("image", "question", "direct_answers"), 32,
        both(10, 5e-6, 0.0, 128), "VQA accuracy",
    ),
    "aokvqa_mc": Transfer(
        "a_ok_vqa/1.0.0", "train", "train+val", "val",
        MultipleChoice(
            "image", "question", "multiple_choice_possible_answers", "multiple_choice_correct_idx"
        ), 128,
        both(15, 5e-6, 0.0, 128), "accuracy",
    ),
    "ai2d": Transfer(
        "ai2d/1.1.0", "train[:-1024]", "train", "train[-1024:]",
        MultipleChoice("image", "question", "possible_answers", "answer"), 128,
        both(10, 1e-5, 1e-6), "accuracy",
    ),
    "gqa": Transfer(
        "gqa/1.0.0", "train_balanced", "train_balanced+val_balanced", "val_balanced", ASK, 32,
        {224: Best(1, 1e-5, 0.0), 448: Best(1, 1e-5, 0.0, freeze_vit=True)}, "accuracy",
    ),
    "nlvr2": Transfer(
        "nlvr2", "train", "train+dev", "dev",
        QuestionAnswer(("image_left", "image_right"), "sentence", "label"), 64,
        {224: Best(3, 1e-5, 1e-6), 448: Best(10, 3e-6, 3e-7)}, "accuracy",
    ),
    "science_qa": Transfer(
        "science_qa/1.0.0", "train", "train+val", "val", ScienceQuestion(), 512,
        {size: Best(20, 1e-5, 0.0, 128, freeze_vit=True) for size in (224, 448)},
        "accuracy", (ShuffleOptions(),),
    ),
    "rsvqa_lr": Transfer(
        "rsvqa_lr/nonum/1.0.2", "train", "train+val", "val", ASK_ANY, 32,
        both(3, 3e-6, 0.0), "mean accuracy of the types", LOWER, smoothing=0.2,
    ),
    "rsvqa_hr": Transfer(
        "rsvqa_hr/nonum/1.0.2", "train", "train+val", "val", ASK_ANY, 32,
        both(1, 1e-5, 0.0), "mean accuracy of the types", LOWER,
    ),
    "chartqa": Transfer(
        "chart_qa/human/1.0.0 chart_qa/augmented/1.0.0", "train", "train+val", "val",
        Fields("image", "question", "answer"), 48,
        {size: Best(30, 1e-5, 1e-6) for size in (224, 448, 896)}, "relaxed accuracy",
        smoothing=0.2, dropout=0.1,
    ),
    "vizwizvqa": Transfer(
        "viz_wiz_vqa/1.0.0", "train", "train+val", "val", ASK_ANY, 48,
        both(10, 1e-5, 0.0), "VQA accuracy",
    ),
    "tallyqa": Transfer(
        "tally_qa/1.0.0", "train", "train", "train[:5%]", ASK, 32,
        {224: Best(2, 1e-5, 0.0), 448: Best(2, 1e-5, 1e-6), 896: Best(2, 7e-6, 7e-7)}, "accuracy",
    ),
    "ocrvqa": Transfer(
        "ocrvqa_id", "train+val[20000:]", "train+val", "val[:20000]", ASK, 32,
        {224: Best(3, 3e-6, 0.0, 128), 448: Best(3, 3e-6, 0.0, 128), 896: Best(3, 1e-5, 0.0, 128)},
        "accuracy",
    ),
    "textvqa": Transfer(
        "text_vqa/1.0.1", "train", "train+val", "val", ASK_ANY, 32,
        {224: Best(5, 3e-6, 0.0), 448: Best(10, 3e-6, 3e-7), 896: Best(10, 3e-6, 0.0)},
        "VQA accuracy",
    ),
    "docvqa": Transfer(
        "doc_vqa/1.0.0", "train[:-5%]", "train+val", "train[-5%:]",
        Fields("image", "question", "answers"), 32,
        {size: Best(10, 1e-5, 1e-6) for size in (224, 448, 896)}, "ANLS", (RandomAnswer(),),
    ),
    "infovqa": Transfer(
        "infovqa/1.1.0", "train", "train+val", "val", ASK_ANY, 48,
        {224: Best(3, 1e-5, 1e-6), 448: Best(3, 1e-5, 1e-6, 128), 896: Best(3, 3e-6, 3e-7, 32)},
        "ANLS", LOWER, smoothing=0.4,
    ),
    "stvqa": Transfer(
        "stvqa/1.2.0", "train", "train+val", "val", ASK_ANY, 48,
        {224: Best(3, 1e-5, 1e-6), 448: Best(3, 1e-5, 1e-6, 128), 896: Best(3, 3e-6, 3e-7, 32)},
        "ANLS", LOWER, smoothing=0.1,
    ),
    "pope": Transfer(  # big_vision takes no step here and only measures; epochs and rate are ours
        "pope/pope_random/1.0.0 pope/pope_popular/1.0.0 pope/pope_adversarial/1.0.0",
        "test", "test", "test", Fields("image", "question", "answer"), 48,
        both(1, 1e-5, 0.0), "accuracy",
    ),
    # Masks.
    "refcoco_seg": Transfer(
        "ref_coco_bv/refcocox_combined/1.4.0", "train", "train", "validation", Referring(), 48,
        {224: Best(100, 3e-5, 0.0, dropout=0.1), 448: Best(100, 1e-5, 0.0),
         896: Best(100, 1e-5, 0.0, 64)},
        "mean IoU", (CycleObjects(), CycleAnswers()), smoothing=0.3,
    ),
    # Videos, as several pictures: 16 frames (MSVD 8) of a stride of 30, 70, 9, 9, 26, 7.
    "activitynet_cap": Transfer(
        "activitynet_captions_mr", "train", "train+valid", "valid", TELL_VIDEO, 64,
        {224: Best(1, 1e-5, 1e-6, 128, freeze_vit=True)}, "CIDEr", (RandomAnswer(),),
    ),
    "activitynet_qa": Transfer(
        "activitynet_qa", "train", "train+valid", "valid", ASK_VIDEO, 64,
        {224: Best(1, 1e-5, 1e-6, 128)}, "accuracy",
    ),
    "msrvtt_cap": Transfer(
        "msrvtt", "train", "train+valid", "valid", TELL_VIDEO, 32,
        {224: Best(20, 1e-5, 0.0, 128, freeze_vit=True)}, "CIDEr", (RandomAnswer(),),
    ),
    "msrvtt_qa": Transfer(
        "msrvtt_qa", "train", "train+valid", "valid", ASK_VIDEO, 64,
        {224: Best(1, 1e-5, 0.0, 128, freeze_vit=True)}, "accuracy",
    ),
    "msvd_qa": Transfer(
        "msvd_qa", "train", "train+valid", "valid", ASK_VIDEO, 64,
        {224: Best(1, 3e-6, 3e-7, 128)}, "accuracy",
    ),
    "vatex_cap": Transfer(
        "vatex", "train", "train+valid", "valid", TELL_VIDEO, 64,
        {224: Best(10, 3e-6, 3e-7, 128)}, "CIDEr", (RandomAnswer(),),
    ),
    # big_vision's two of 100 long captions, in JSON lines.
    "longcap100": Transfer(
        "longcap100", "data_train90", "data_train90", "data_val10", Caption("image", "suffix"), 128,
        {224: Best(15, 1e-5, 3e-7, 32)}, "loss",
    ),
    "longcap100_l4": Transfer(
        "longcap100", "data_train90", "data_train90", "data_val10", Caption("image", "suffix"), 128,
        {224: Best(1, 0.1, 0.0, 4)}, "loss", method=SGD(),
    ),
}  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(
        arg, task="", data="", root="~/tensorflow_datasets", resolution=224, version=1, size="3b",
        final_split=False, freeze_vit="", model="",
    )  # fmt: skip
    if args.task not in TRANSFERS:
        raise ConfigError(
            f"There is no transfer {args.task!r}. {', '.join(TRANSFERS)} fit. Write for example "
            "--config transfers/table:task=vqav2"
        )
    task = TRANSFERS[args.task]
    best = task.best.get(args.resolution) or task.best[max(task.best)]
    freeze = args.freeze_vit in ("True", "yes", "1") if args.freeze_vit else best.freeze_vit
    names = dict(model=args.model, version=args.version, size=args.size, resolution=args.resolution)
    base = ",".join(f"{name}={value}" for name, value in names.items())
    config = load_config(f"base:{base}")
    reader = task.reader
    if isinstance(reader, Outlined):
        reader = dataclasses.replace(reader, size=args.resolution)
    if isinstance(reader, Referring) and args.data.endswith(".jsonl"):
        reader = Fields("image", "prefix", "suffix")
    masks = isinstance(reader, Referring)
    places = [args.data] if args.data else [f"{args.root}/{name}" for name in task.data.split()]
    split = task.final if args.final_split else task.split
    train = [Data(place, split, reader, masks=masks) for place in places]
    if args.task == "coco35l":
        train = [
            Data(places[0], f"train_{language}", Caption("image", "captions", language))
            for language in LANGUAGES
        ]
    with config.unlocked():
        config.train = tuple(train) if len(train) > 1 else train[0]
        config.validation = Data(places[0], task.validation, reader, masks=masks)
        config.transforms = task.transforms
        config.text_length = task.length
        config.sample_tokens = task.length
        config.batch_size = best.batch
        config.duration = Epochs(best.epochs)
        if task.examples:
            config.duration = Examples(best.epochs * task.examples)
        config.learning_rate = best.rate
        config.method = task.method
        config.weight_decay = best.decay
        config.trainable = "llm/.*" if freeze else None
        config.step = dataclasses.replace(
            config.step,
            label_smoothing=task.smoothing,
            dropout=task.dropout if best.dropout is None else best.dropout,
        )
        config.checkpoint_every = Steps(1000)
        config.evaluate_every = Share(0.1)
    return config
