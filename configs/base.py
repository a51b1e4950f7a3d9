"""Every setting of a training run, with what it is good for. Other files here change some of them.

    paligemma train --config base:data=my_dataset --workdir runs/mine
    paligemma train --config base:data=my_dataset,size=10b,resolution=448 --workdir ...
    paligemma train ... --config.learning_rate=3e-5 --config.duration='Epochs(3)'

Arguments: `model`, anything that `from_pretrained` takes; or `version` (1: PaliGemma, 2: PaliGemma
2), `size` (3b, 10b, 28b) and `resolution` (224, 448, 896) of a published checkpoint, which must be
in a directory of that name. `data` and `validation` are files or directories; a directory with
several splits gives both.
"""

from ml_collections import ConfigDict

from paligemma_jax.data.transforms import RandomAnswer
from paligemma_jax.models.sharding import Axes, Rules
from paligemma_jax.training.config import Data, TrainConfig, parse_arg
from paligemma_jax.training.optimizer import KERNELS, Adam, Cosine, Epochs, Share, Steps
from paligemma_jax.training.step import StepConfig, StopAtBadLoss


def get_config(arg: str = "") -> ConfigDict:
    args = parse_arg(
        arg, data="", validation="", model="", version=2, size="3b", resolution=224, freeze=""
    )
    published = "paligemma-3b" if args.version == 1 else f"paligemma2-{args.size}"
    return TrainConfig(
        # "pt" checkpoints are made to be fine-tuned; "mix" ones know many tasks already.
        model=args.model or f"{published}-pt-{args.resolution}",
        # Other pixels a side than the checkpoint's: its position embeddings are resampled.
        resolution=None,
        # The splits "train" and "valid" of a directory; a file is taken whole. Several data sets
        # by weight: Mixture(MixtureComponent("captions.jsonl", 3.0), MixtureComponent("boxes")).
        train=Data(args.data) if args.data else None,
        validation=Data(args.validation, "valid") if args.validation else None,
        # In turn: one of several answers, order of boxes, crops, JPEG, small letters, ...
        transforms=(RandomAnswer(),),
        validation_transforms=None,  # as in training
        # Tokens of prompt and answer, the separators too. `paligemma train --check DATA` counts.
        text_length=128,
        on_overflow="error",  # "truncate" cuts as big_vision does
        max_bad_records=0.0,  # 0.01 skips up to 1 % unusable records, and logs each
        workers=0,  # processes that read; 0 reads in threads, enough up to some hundred pictures/s
        # Rows of one update, of all devices together.
        batch_size=32,
        duration=Epochs(15),  # or Steps(1000), Examples(50_000)
        seed=0,
        # Larger models want smaller ones: 3B 3e-6 to 1e-5, 10B and 28B 6e-7 to 3e-6 (PaliGemma 2,
        # table 14).
        learning_rate=1e-5,
        method=Adam(),  # AdamW(), Adafactor(), SGD()
        schedule=Cosine(warmup=Share(0.05)),  # Linear, Constant, ReciprocalSquareRoot
        # Added share of the weights, scaled by the schedule but not by the learning rate: 0.1 in
        # PyTorch's convention is 0.1 * learning_rate here.
        weight_decay=3e-7,
        decays=KERNELS,  # which weights decay, by path: the image encoder's matrices
        clip_norm=1.0,
        # What is trained, as a regular expression over parameter paths; None is all. "llm/.*"
        # freezes the image encoder, "img/.*" the language model, "llm/layers/attn/.*" all but
        # attention.
        trainable={"": None, "vit": "llm/.*", "llm": "img/.*"}[args.freeze],
        schedules=None,  # a schedule for each path instead: Rules((("img/.*", None), ...))
        rate_factors=Rules(()),  # Rules((("img/.*", 0.1),)): the encoder learns ten times slower
        step=StepConfig(
            label_smoothing=0.0,
            dropout=0.0,  # in the language model
            # Parts that a batch goes through in, one after the other: less memory, same result.
            microbatches=1,
            remat="full",  # "dots" or "none": faster, with more memory
            ema=None,  # 0.999: the result is an average over the last thousand updates or so
        ),
        lora=None,  # LoRA(rank=8): trains adapters alone
        quantize=None,  # Int8() or Int4() beneath the adapters
        # PaliGemma 2's cap of 30 is off in transfers (big_vision); None leaves it as it is.
        final_logit_softcap=0.0,
        dtype="bfloat16",  # of activations and frozen weights; "float32" on CPUs
        master_dtype="float32",  # of trained weights and the optimizer's state
        # data, fsdp, tensor: fsdp=-1 splits weights and batches over all devices.
        mesh=Axes(fsdp=-1),
        bad_loss=StopAtBadLoss(),  # SkipBadLoss(10) leaves out up to ten bad steps in a row
        log_every=Steps(10),
        evaluate_every=Share(0.1),
        evaluate_batches=16,
        samples=8,  # validation records answered and drawn into samples.png
        sample_tokens=128,
        checkpoint_every=Steps(200),
        keep=2,
        best=None,  # Best("validation_loss"): the result is the best checkpoint, not the last
        tensorboard=None,  # where tensorboardX is installed
        wandb=None,  # the project at Weights & Biases to report to
        save_dtype=None,  # of the result; None is the checkpoint's
    ).to_config()
