"""Every published model, under every name that it has anywhere."""

import dataclasses
import functools
import re

from paligemma_jax.config import VARIANTS, PaliGemmaConfig
from paligemma_jax.hub.scores import DOCCI, DOCCI_USE, TASKS, Score

_NAME = re.compile(r"paligemma(2?)-(\d+b)-(pt|mix|ft)(?:-(.+))?-(\d+)")
_GENERAL = {
    "pt": "for fine-tuning",
    "mix": "captions, answers, boxes, masks, reading",
}
# The versions that a hub of computer-vision models serves these under.
_ROBOFLOW = {
    "mix-224": 1, "mix-448": 20,
    "ft-cococap-224": 8, "ft-screen2words-224": 9, "ft-vqav2-224": 10,
    "ft-tallyqa-224": 11, "ft-docvqa-224": 12, "ft-ocrvqa-224": 13,
    "ft-cococap-448": 14, "ft-screen2words-448": 15, "ft-vqav2-448": 16,
    "ft-tallyqa-448": 17, "ft-docvqa-448": 18, "ft-ocrvqa-448": 19,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
      name: as in `VARIANTS`, and behind "google/" at Hugging Face.
      generation: 1 or 2.
      size: of the whole, as its name says: "3b", "10b" or "28b".
      kind: "pt" (pretrained), "mix" (of many tasks) or "ft" (fine-tuned for one).
      task: of a fine-tuned one, as in the name; "" for others.
      resolution: pixels a side.
      use: what it is for.
      score: what was published for a fine-tuned one.
    """

    name: str
    generation: int
    size: str
    kind: str
    task: str
    resolution: int
    use: str
    score: Score | None

    @property
    def config(self) -> PaliGemmaConfig:
        return VARIANTS[self.name]

    @property
    def repository(self) -> str:
        """At Hugging Face, as safetensors."""
        return f"google/{self.name}"

    @property
    def jax_repository(self) -> str:
        """At Hugging Face, as big_vision's npz."""
        return f"google/{self.name}-jax"

    @property
    def revisions(self) -> tuple[str, ...]:
        """Branches at Hugging Face; `main` has float32 for PaliGemma, bfloat16 for PaliGemma 2."""
        return ("main", "bfloat16", "float16") if self.generation == 1 else ("main",)

    @property
    def kaggle(self) -> str | None:
        """Handle of big_vision's npz at Kaggle; None where it is not known."""
        if self.generation == 2:
            return f"google/paligemma-2/jax/{self.name}"
        return None if self.kind == "ft" else f"google/paligemma/jax/{self.name}"

    @property
    def keras_preset(self) -> str | None:
        """Name of the same weights in KerasHub."""
        if self.generation == 1:
            kind = {"pt": "", "mix": "mix_"}.get(self.kind)
            return None if kind is None else f"pali_gemma_3b_{kind}{self.resolution}"
        if self.kind == "ft":
            family = "pali_gemma_2" if self.size == "3b" else "pali_gemma2"  # as it is spelt there
            return f"{family}_ft_{self.task}_{self.size}_{self.resolution}"
        return f"pali_gemma2_{self.kind}_{self.size}_{self.resolution}"

    @property
    def roboflow(self) -> str | None:
        """Model and version that Roboflow knows these weights by, besides their name."""
        number = _ROBOFLOW.get(self.name.removeprefix("paligemma-3b-"))
        return None if number is None else f"paligemma-pretrains/{number}"

    @property
    def aliases(self) -> tuple[str, ...]:
        """Every other name of these weights, in lower case, without "google/"."""
        preset = self.keras_preset
        family = "paligemma" if self.generation == 1 else "paligemma2"
        presets = [] if preset is None else [preset]
        if self.generation == 2 and self.kind == "ft":
            # Two words of the name have been in either order.
            presets.append(f"pali_gemma2_{self.size}_ft_{self.task}_{self.resolution}")
        if self.size == "28b" and self.kind == "mix":
            presets.append(f"pali_gemma2_28b_mix_{self.resolution}")
        return tuple(
            dict.fromkeys(
                [f"{self.name}-jax", f"{self.name}-keras"]
                + presets
                + [f"keras/{family}/keras/{name}" for name in presets]
                + ([self.kaggle.removeprefix("google/")] if self.kaggle else [])
                + ([self.roboflow] if self.roboflow else [])
            )
        )


def _published(name: str) -> Published:
    match = _NAME.fullmatch(name)
    assert match, name
    two, size, kind, task, resolution = match.groups()
    if kind != "ft":
        use, score = _GENERAL[kind], None
    elif task == "docci":
        use, score = DOCCI_USE, DOCCI[size]
    else:
        use, score = TASKS[task].use, TASKS[task].score(int(resolution))
    generation = 2 if two else 1
    return Published(name, generation, size, kind, task or "", int(resolution), use, score)


CATALOGUE: dict[str, Published] = {name: _published(name) for name in VARIANTS}


@functools.cache
def _names() -> dict[str, Published]:
    table = {alias: entry for entry in CATALOGUE.values() for alias in entry.aliases}
    return table | CATALOGUE


def find_published(name: str) -> Published | None:
    """The model of a published name or alias, in any case, with or without its owner."""
    return _names().get(name.lower().removeprefix("google/"))
