"""Every setting of a training run and what it is for. The other configurations change some.

    paligemma train --config base:data=my_dataset --workdir runs/mine
    paligemma train --config base:data=my_dataset,size=10b,resolution=448 --workdir ...
    paligemma train ... --config.learning_rate=3e-5 --config.duration='Epochs(3)'

Arguments: `model`, anything that `from_pretrained` takes; or `version` (1: PaliGemma, 2: PaliGemma
2), `size` (3b, 10b, 28b) and `resolution` (224, 448, 896) of a published checkpoint. `data` and
`validation` are files or directories in any layout of `paligemma_jax.data.find_splits`. `freeze` is
"vit" (the image encoder) or "llm" (the language model).
"""

from ml_collections import ConfigDict

from paligemma_jax.data.transforms import RandomAnswer
from paligemma_jax.errors import ConfigError
from paligemma_jax.models.sharding import Axes, Rules
from paligemma_jax.training.config import Data, TrainConfig, parse_arg
from paligemma_jax.training.optimizer import KERNELS, Adam, Cosine, Epochs, Fraction, Steps

_TRAINED = {"": None, "vit": "llm/.*", "llm": "img/.*"}  # by what is frozen


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(
        arg, data="", validation="", model="", version=2, size="3b", resolution=224, freeze=""
    )
    if args.freeze not in _TRAINED:
        raise ConfigError(f"expected freeze=vit or freeze=llm, got freeze={args.freeze}")
    published = "paligemma-3b" if args.version == 1 else f"paligemma2-{args.size}"
    return TrainConfig(
        # "pt" checkpoints are for fine-tuning; "mix" ones were fine-tuned on many tasks.
        model=args.model or f"{published}-pt-{args.resolution}",
        # Another image size than the checkpoint's: its position embeddings are resampled.
        resolution=None,
        # The splits "train" and "valid" of a directory; a file is taken whole. Several data sets
        # by weight: Mixture(MixtureComponent("captions.jsonl", 3.0), MixtureComponent("boxes")).
        train=Data(args.data) if args.data else None,
        validation=Data(args.validation, "valid") if args.validation else None,
        # Applied in turn: choice of an answer, order of boxes, crops, lower case, ...
        transforms=(RandomAnswer(),),
        validation_transforms=None,  # as in training
        # Tokens of prompt and answer, with separators. `paligemma train --check-data DATA` counts.
        text_length=128,
        on_overflow="error",  # "truncate": as big_vision does
        max_bad_fraction=0.0,  # 0.01 skips up to 1 % unusable records, and logs each
        workers=0,  # processes that read; 0: threads, enough up to some hundred images/s
        # Examples of one update, over all devices.
        batch_size=32,
        duration=Epochs(15),  # or Steps(1000), Examples(50_000)
        seed=0,
        # Smaller for larger models: 3B 3e-6 to 1e-5, 10B and 28B 6e-7 to 3e-6 (PaliGemma 2, table
        # 14).
        learning_rate=1e-5,
        optimizer=Adam(),  # AdamW(), Adafactor(), SGD()
        schedule=Cosine(warmup=Fraction(0.05)),  # Linear, Constant, ReciprocalSquareRoot
        # Multiplied by the schedule, but not by the learning rate: 0.1 in PyTorch's convention is
        # 0.1 * learning_rate here.
        weight_decay=3e-7,
        weight_decay_multipliers=KERNELS,  # which weights decay, by path
        max_grad_norm=1.0,
        # Trained parameters, as a regular expression over their paths; None: all. "llm/.*" freezes
        # the image encoder, "img/.*" the language model, "llm/layers/attn/.*" all but attention.
        trainable=_TRAINED[args.freeze],
        schedules=None,  # schedules by path instead: Rules((("img/.*", None), ...))
        lr_multipliers=Rules(()),  # Rules((("img/.*", 0.1),)): a tenth for the image encoder
        loss_reduction="example",  # as in big_vision; "token": long answers count more
        label_smoothing=0.0,
        dropout=0.0,  # in the language model
        # Gradients of so many parts of a batch are accumulated: less memory, same result.
        gradient_accumulation_steps=1,
        remat="full",  # "dots" or "none": faster, with more memory
        ema=None,  # 0.999: the result is the exponential moving average of about 1,000 updates
        lora=None,  # LoRA(rank=8): trains adapters only
        quantize=None,  # Int8() or Int4() beneath the adapters
        # 0.0: PaliGemma 2's cap of 30 is off in transfers (big_vision); None: the checkpoint's.
        final_logit_softcap=0.0,
        dtype="bfloat16",  # of activations and frozen weights; "float32" on CPUs
        master_dtype="float32",  # of trained weights and the optimizer's state
        # Axes data, fsdp, tensor; fsdp=-1 shards weights and batches over all devices.
        mesh=Axes(fsdp=-1),
        max_skipped_steps=0,  # 10: skips up to ten updates in a row with NaN in loss or gradient
        loss_spike_factor=None,  # 10.0: a loss ten times the usual one stops the run
        log_every=Steps(10),
        evaluate_every=Fraction(0.1),
        evaluate_batches=16,
        samples=8,  # validation records answered and drawn, in samples.png
        sample_max_new_tokens=128,
        checkpoint_every=Steps(200),
        max_to_keep=2,
        best=None,  # Best("validation_loss"): the result is the best checkpoint
        tensorboard=None,  # None: if tensorboardX is installed
        wandb=None,  # project at Weights & Biases to report to
        save_dtype=None,  # of the result; None: the checkpoint's
    ).to_config()
