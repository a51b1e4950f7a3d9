"""Trains the bundled demo model from scratch on the synthetic world, on CPU or GPU.

    python -m checkpoints.training.mask_codec --target DIR/mask_codec.npz
    python -m checkpoints.training.train --mask_codec DIR/mask_codec.npz --workdir DIR
    python -m checkpoints.training.train ... --config.total_steps=500

The same command resumes an interrupted run, bit for bit on the same machine. To train
another world or size, pass a changed copy of this file: --config FILE.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 8_200

    # Real architecture, small: under 8 MB in bfloat16 with its vocabulary.
    config.model = dict(
        img=dict(image_size=112, patch_size=14, width=192, depth=6, mlp_dim=576, num_heads=4),
        llm=dict(
            width=192,
            depth=3,
            mlp_dim=512,
            num_heads=4,
            num_kv_heads=1,
            head_dim=48,
            query_scale=48**-0.5,
        ),
        text_length=64,
    )

    # One step: `scenes` images, each encoded once and asked `short` + `long` prompts; `pairs`
    # of two images; `pages` of words that only the encoder reads. Two text lengths, so that short
    # answers do not pay for captions.
    config.batch = dict(
        scenes=24,
        short=2,
        long=2,
        pairs=6,
        pages=20,
        short_length=21,
        long_length=55,
        pair_length=14,
        supersampled_fraction=0.5,  # scenes drawn at twice the size and then resized, as users' are
        text_fraction=0.5,  # scenes that are drawn again until something is written in them
        short_weights=dict(count=0.34, color=0.1, where=0.14, exists=0.12, ocr=0.5),
        long_weights=dict(
            caption_en=0.13,
            caption_es=0.13,
            caption_de=0.13,
            caption_fr=0.13,
            detect=0.9,
            segment=0.3,
        ),
    )

    # Muon on matrices, Adam on the rest; warm-up, plateau, linear decay to zero.
    config.optimizer = dict(
        learning_rate=2.5e-3,
        adam_learning_rate=1e-3,
        weight_decay=0.01,
        warmup_steps=100,
        cooldown=0.55,
        max_grad_norm=1.0,
    )
    # Neighbouring <loc> bins share the target of a coordinate: a Gaussian of so many bins.
    config.loc_sigma = 6.0
    config.pair_weight = 0.3
    # A linear probe teaches the encoder what each patch shows: first alone, then beside the rest.
    config.patch_steps = 600
    config.patch_weight = 0.5

    config.log_every = 25
    config.evaluate_every = 500
    config.checkpoint_every = 250
    return config.lock()
