"""Architecture of every published PaliGemma, as frozen and hashable dataclasses.

Sizes: big_vision's `models/vit.py` and `models/ppp/gemma.py`; PaliGemma (arXiv 2407.07726, section
3.1) and PaliGemma 2 (arXiv 2412.03555, section 3).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from paligemma_jax.errors import ConfigError

VOCAB_SIZE = 257_152  # 256,000 Gemma pieces, 1,024 <loc>, 128 <seg>


def _require(config: object, problems: list[str]) -> None:
    if problems:
        raise ConfigError(f"{type(config).__name__} is inconsistent: " + "; ".join(problems) + ".")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigLIPConfig:
    """SigLIP image encoder (arXiv 2303.15343): a pre-norm ViT without class token or pooling.

    `image_size` and `patch_size` are in pixels; images are square.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16

    def __post_init__(self) -> None:
        problems = [f"{n} is {v}, must be positive" for n, v in vars(self).items() if v < 1]
        if not problems and self.image_size % self.patch_size:
            problems.append(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if not problems and self.width % self.num_heads:
            problems.append(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        _require(self, problems)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_patches(self) -> int:
        """Image tokens per image."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """Gemma or Gemma 2 decoder (arXiv 2403.08295, 2408.00118).

    Attributes:
      query_scale: factor on the rotated queries; `head_dim**-0.5` but for the 27B.
      post_norms: Gemma 2's second RMSNorm after attention and after the MLP.
      attn_logit_softcap: cap * tanh(logits / cap) on attention logits; 0.0 is off.
      final_logit_softcap: the same on the output logits, everywhere it is set; 0.0 is off.
      sliding_window: tokens that an answer token of an even layer attends to, itself included
        (Hugging Face's rule); None is full attention (big_vision's rule).
      tie_embeddings: whether the output head is the embedding table, as in every published one.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scale: float
    vocab_size: int = VOCAB_SIZE
    post_norms: bool = False
    attn_logit_softcap: float = 0.0
    final_logit_softcap: float = 0.0
    sliding_window: int | None = None
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        sizes = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
        problems = [
            f"{n} is {getattr(self, n)}, must be positive" for n in sizes if getattr(self, n) < 1
        ]
        if not problems and self.num_heads % self.num_kv_heads:
            problems.append(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if not problems and self.head_dim % 2:
            problems.append(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        if self.attn_logit_softcap < 0 or self.final_logit_softcap < 0:
            problems.append("soft-caps must be 0.0 (off) or positive")
        if self.sliding_window is not None and self.sliding_window < 1:
            problems.append(f"sliding_window is {self.sliding_window}, must be None or positive")
        _require(self, problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaliGemmaConfig:
    """A SigLIP encoder, a linear projection to the decoder's width, and a Gemma decoder.

    `text_length` is the number of text tokens (prompt and answer) the checkpoint was trained with.
    """

    img: SigLIPConfig
    llm: GemmaConfig
    text_length: int = 128

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PaliGemmaConfig":
        """Inverse of `to_dict`; raises ConfigError naming unknown and missing fields."""
        try:
            return cls(
                img=SigLIPConfig(**values["img"]),
                llm=GemmaConfig(**values["llm"]),
                **{k: v for k, v in values.items() if k not in ("img", "llm")},
            )
        except KeyError as e:
            raise ConfigError(f"PaliGemmaConfig lacks the field {e}.") from e
        except TypeError as e:
            raise ConfigError(f"PaliGemmaConfig is invalid: {e}.") from e


GEMMA_2B = GemmaConfig(
    width=2048,
    depth=18,
    mlp_dim=16_384,
    num_heads=8,
    num_kv_heads=1,
    head_dim=256,
    query_scale=256**-0.5,
)
# The final cap is 0.0 as in big_vision's configs; a Hugging Face checkpoint brings its own 30.
GEMMA2_2B = GemmaConfig(
    width=2304,
    depth=26,
    mlp_dim=9216,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    query_scale=256**-0.5,
    post_norms=True,
    attn_logit_softcap=50.0,
)
GEMMA2_9B = dataclasses.replace(
    GEMMA2_2B, width=3584, depth=42, mlp_dim=14_336, num_heads=16, num_kv_heads=8
)
GEMMA2_27B = dataclasses.replace(
    GEMMA2_2B,
    width=4608,
    depth=46,
    mlp_dim=36_864,
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
    query_scale=(4608 / 32) ** -0.5,
)


def _variants() -> dict[str, PaliGemmaConfig]:
    """Every published id (5 + 54 of PaliGemma, 17 of PaliGemma 2) under its name on the hubs."""
    # Text lengths: big_vision's README (128 at 224, 512 above; mix 256, 512), transfers' configs.
    pretrained = {224: 128, 448: 512, 896: 512}
    mix = {224: 256, 448: 512}
    transfers = {
        "ai2d": 128,
        "aokvqa-da": 32,
        "aokvqa-mc": 128,
        "coco35l": 32,
        "cococap": 32,
        "docvqa": 32,
        "gqa": 32,
        "infovqa": 48,
        "nlvr2": 64,
        "ocrvqa": 32,
        "okvqa": 32,
        "refcoco-seg": 48,
        "rsvqa-hr": 32,
        "rsvqa-lr": 32,
        "scicap": 96,
        "science-qa": 512,
        "screen2words": 24,
        "stvqa": 48,
        "tallyqa": 32,
        "textcaps": 32,
        "textvqa": 32,
        "vizwizvqa": 48,
        "vqav2": 32,
        "widgetcap": 32,
    }
    with_896 = {"docvqa", "infovqa", "ocrvqa", "refcoco-seg", "stvqa", "textvqa"}
    sizes = {"3b": GEMMA2_2B, "10b": GEMMA2_9B, "28b": GEMMA2_27B}
    table: dict[str, PaliGemmaConfig] = {}

    def add(name: str, llm: GemmaConfig, resolution: int, text_length: int) -> None:
        table[f"{name}-{resolution}"] = PaliGemmaConfig(
            img=SigLIPConfig(image_size=resolution), llm=llm, text_length=text_length
        )

    for resolution, length in pretrained.items():
        add("paligemma-3b-pt", GEMMA_2B, resolution, length)
    for resolution, length in mix.items():
        add("paligemma-3b-mix", GEMMA_2B, resolution, length)
    for task, length in transfers.items():
        for resolution in (224, 448, 896) if task in with_896 else (224, 448):
            add(f"paligemma-3b-ft-{task}", GEMMA_2B, resolution, length)
    for size, llm in sizes.items():
        for resolution, length in pretrained.items():
            add(f"paligemma2-{size}-pt", llm, resolution, length)
        for resolution, length in mix.items():
            add(f"paligemma2-{size}-mix", llm, resolution, length)
    for size in ("3b", "10b"):
        add(f"paligemma2-{size}-ft-docci", sizes[size], 448, 512)
    return table


VARIANTS: dict[str, PaliGemmaConfig] = _variants()
