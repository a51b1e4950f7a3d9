"""PEFT's names of what adapters are on, and where ours keep the same numbers.

A module is one `torch.nn.Linear` of Hugging Face's PaliGemma: one part of one layer's weights. It
has three names, by the version of transformers that wrote it:

    up to 4.51  language_model.model.layers.0...        vision_tower.vision_model.encoder...
    4.52 to 4   model.language_model.layers.0...        model.vision_tower.vision_model.encoder...
    5           model.language_model.layers.0...        model.vision_tower.encoder...
"""

import dataclasses
import re

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.lora import Place
from paligemma_jax.weights.hf_names import HFTensor, canonical_key, hf_tensors

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


@dataclasses.dataclass(frozen=True)
class Module:
    """One module that an adapter can be on.

    Attributes:
      name: canonical, see `canonical_key`; "language_model.layers.0.self_attn.k_proj".
      place: where ours has its adapter.
      index: of its adapter in the arrays there: layer, part.
    """

    name: str
    place: Place
    index: tuple[int, ...]

    @property
    def spellings(self) -> tuple[str, str, str]:
        """See `spellings`."""
        return spellings(self.name)

    def key(self, side: str, old_names: bool = False) -> str:
        """PEFT's key of lora_A or lora_B, in transformers 5 or as before 4.52."""
        return spell(f"{self.name}.lora_{side}.weight", old_names)

    @property
    def shapes(self) -> tuple[int, int]:
        """Widths of its inputs and outputs."""
        ins = outs = 1
        for size in self.place.inputs:
            ins *= size
        for size in self.place.outputs:
            outs *= size
        return ins, outs


@dataclasses.dataclass(frozen=True)
class AdapterKey:
    """What a key of adapter_model.safetensors says.

    Attributes:
      name: canonical, of the module; or of the whole tensor, with ".weight".
      side: "A", "B", or None for a tensor that was trained whole (modules_to_save).
      adapter: the adapter's name where the key has one.
    """

    name: str
    side: str | None
    adapter: str | None = None


def spellings(name: str) -> tuple[str, str, str]:
    """What a canonical name is in transformers 5, in 4.52 and later, and before."""
    with_room = re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)
    old = re.sub(r"^language_model\.", "language_model.model.", with_room)
    return f"model.{name}", f"model.{with_room}", old


def spell(name: str, old_names: bool) -> str:
    """PEFT's key of a tensor with this canonical name."""
    return f"base_model.model.{spellings(name)[2 if old_names else 0]}"


def find_modules(config: PaliGemmaConfig, places: dict[str, Place]) -> dict[str, Module]:
    """Every module that an adapter can be on, by its canonical name."""
    modules = {}
    for tensor in hf_tensors(config):
        path = tensor.path.rpartition("/")[0]
        if path not in places or not tensor.key.endswith(".weight"):
            continue
        place = places[path]
        for layer in range(place.depth) if place.depth is not None else (None,):
            name = tensor.key.format(layer).removesuffix(".weight")
            index = () if layer is None else (layer,)
            modules[name] = Module(name, place, index + _part(tensor))
    return modules


def _part(tensor: HFTensor) -> tuple[int, ...]:
    return () if tensor.part is None else (tensor.part,)


def read_key(key: str) -> AdapterKey:
    """The meaning of a key in any of its spellings."""
    key = re.sub(r"^(base_model\.model\.)+", "", key)
    match = _KEY.fullmatch(key)
    if match is None:
        whole = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.(weight|bias)$)", "", key)
        return AdapterKey(canonical_key(whole), None)
    return AdapterKey(canonical_key(match["module"]), match["side"], match["adapter"])
