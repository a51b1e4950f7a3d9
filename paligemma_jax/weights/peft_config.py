"""adapter_config.json and the names of PEFT: which modules an adapter is on, and how.

A module is one `torch.nn.Linear` of Hugging Face's PaliGemma: one part of one layer's weights. It
has three names, by the version of transformers that wrote it:

    up to 4.51  language_model.model.layers.0...        vision_tower.vision_model.encoder...
    4.52 to 4   model.language_model.layers.0...        model.vision_tower.vision_model.encoder...
    5           model.language_model.layers.0...        model.vision_tower.encoder...
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_jax.config import PaliGemmaConfig
from paligemma_jax.models.lora import LoRA, Place, scale_of
from paligemma_jax.weights.huggingface import canonical_key, hf_tensors

# Fields that say nothing about the numbers, or only together with another that is refused.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "fan_in_fan_out",  # of the base's weights; PEFT itself ignores it for Linear
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Initializations after which the base is another one.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LINEAR = re.compile(r".*(_proj|\.fc[12]|projector\.linear)")
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_LAYER = re.compile(r"(?P<tower>.+?)\.(?:encoder\.)?layers\.(?P<layer>\d+)\.(?P<leaf>.+)")


def spellings(name: str) -> tuple[str, str, str]:
    """What a canonical name is in transformers 5, in 4.52 and later, and before."""
    nested = re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)
    old = re.sub(r"^language_model\.", "language_model.model.", nested)
    return f"model.{name}", f"model.{nested}", old


def peft_key(name: str, old_names: bool) -> str:
    """PEFT's key of a tensor with this canonical name, in transformers 5 or as before 4.52."""
    return f"base_model.model.{spellings(name)[2 if old_names else 0]}"


def read_key(key: str) -> tuple[str, str | None, str | None]:
    """What a key of adapter_model.safetensors names, in any of its spellings.

    The canonical name of the module, "A" or "B", and the adapter's name where the key has one; for
    a tensor that was trained whole (modules_to_save) its canonical name, None and None.
    """
    key = re.sub(r"^(base_model\.model\.)+", "", key)
    match = _KEY.fullmatch(key)
    if match is None:
        whole = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.(weight|bias)$)", "", key)
        return canonical_key(whole), None, None
    return canonical_key(match["module"]), match["side"], match["adapter"]


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
    def shape(self) -> tuple[int, int]:
        """Widths of its inputs and outputs."""
        return math.prod(self.place.inputs), math.prod(self.place.outputs)


def find_modules(config: PaliGemmaConfig, places: Mapping[str, Place]) -> dict[str, Module]:
    """Every module that an adapter can be on, by its canonical name."""
    modules = {}
    for tensor in hf_tensors(config):
        path = tensor.path.rpartition("/")[0]
        if path not in places or not tensor.key.endswith(".weight"):
            continue
        place = places[path]
        part = () if tensor.part is None else (tensor.part,)
        for layer in range(place.depth) if place.depth is not None else (None,):
            name = tensor.key.format(layer).removesuffix(".weight")
            index = () if layer is None else (layer,)
            modules[name] = Module(name, place, index + part)
    return modules


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The fields of adapter_config.json that matter, under PEFT's names."""

    r: int
    lora_alpha: int | float
    use_rslora: bool
    lora_dropout: int | float
    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str]
    layers_to_transform: int | Sequence[int]
    layers_pattern: str | Sequence[str]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, int | float]
    modules_to_save: str | Sequence[str]

    @property
    def saved_modules(self) -> Sequence[str]:
        """`modules_to_save` as a list."""
        return _as_list(self.modules_to_save)

    def targets(self, module: Module) -> bool:
        """Whether a module has an adapter, by PEFT's rules, under any of its names."""
        return any(self._targets(name) for name in spellings(module.name))

    def _targets(self, name: str) -> bool:
        if _matches(self.exclude_modules, name):
            return False
        if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in self.saved_modules):
            return False
        if self.target_modules == "all-linear":
            return _LINEAR.fullmatch(name) is not None
        if not _matches(self.target_modules, name):
            return False
        layers = self.layers_to_transform
        if isinstance(self.target_modules, str) or layers == []:
            return True
        patterns = _as_list(self.layers_pattern) or [r"[^.]*"]
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns)
        layer = next((int(match[1]) for match in found if match), None)
        return layer in ([layers] if isinstance(layers, int) else layers)

    def rank(self, module: Module) -> int:
        """The rank of a module's adapter."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: Module) -> float:
        """What B A of a module is multiplied by."""
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return scale_of(self.rank(module), alpha, self.use_rslora)


def _as_list(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _matches(names: str | Sequence[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(pattern: Mapping[str, Any], module: Module, default: Any) -> Any:
    """The value of the first key that one of the names ends with, as PEFT looks it up."""
    for key, value in pattern.items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in spellings(module.name)):
            return value
    return default


def parse_config(values: Mapping[str, Any]) -> tuple[AdapterConfig, list[str]]:
    """The configuration, and a line for everything in it that is malformed or not supported."""
    problems: list[str] = []

    def refuse(name: str, why: str) -> None:
        problems.append(f"config      {name} is {values.get(name)!r}: {why}")

    def field(name: str, default: Any, valid: Callable[[Any], bool], expected: str) -> Any:
        value = values.get(name)
        if value is None:
            return default
        if valid(value):
            return value
        refuse(name, f"expected {expected}")
        return default

    def names(name: str) -> Any:
        return field(name, [], _are_names, "a list of names, or a valid regular expression")

    if values.get("peft_type") != "LORA":
        refuse("peft_type", "only LORA is supported")
    config = AdapterConfig(
        r=field("r", 8, lambda v: _is_number(v, whole=True) and v > 0, "a positive whole number"),
        lora_alpha=field("lora_alpha", 8, lambda v: _is_number(v) and v > 0, "a positive number"),
        use_rslora=field("use_rslora", False, lambda v: isinstance(v, bool), "true or false"),
        lora_dropout=field(
            "lora_dropout", 0.0, lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to 1"
        ),
        target_modules=names("target_modules"),
        exclude_modules=names("exclude_modules"),
        layers_to_transform=field("layers_to_transform", [], _are_layers, "numbers of layers"),
        layers_pattern=names("layers_pattern"),
        rank_pattern=field(
            "rank_pattern", {}, lambda v: _is_pattern(v, whole=True), "names and whole numbers"
        ),
        alpha_pattern=field("alpha_pattern", {}, _is_pattern, "names and positive numbers"),
        modules_to_save=names("modules_to_save"),
    )
    if values.get("bias", "none") != "none":
        refuse("bias", "trained biases are not supported, only 'none'")
    initial = values.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.startswith(_CHANGES_BASE):
        refuse("init_lora_weights", "such adapters change the base model too")
    known = {field.name for field in dataclasses.fields(AdapterConfig)} | _HARMLESS
    for name in values.keys() - known - {"peft_type", "bias", "init_lora_weights"}:
        if values[name] not in (None, False, "", [], {}):
            dora = "DoRA is not supported; merge it with PEFT first"
            refuse(name, dora if "dora" in name else "not supported, only null or false")
    return config, sorted(problems)


def _is_number(value: Any, whole: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (isinstance(value, int) or not whole)


def _are_names(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, str) for one in value)
    return isinstance(value, str) and _compiles(value)


def _are_layers(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return all(_is_number(one, whole=True) for one in listed)


def _is_pattern(value: Any, whole: bool = False) -> bool:
    return isinstance(value, dict) and all(
        _is_number(one, whole) and one > 0 and _compiles(key) for key, one in value.items()
    )


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def config_values(
    spec: LoRA,
    saved: Mapping[Module, tuple[int, float]],
    modules: Iterable[Module],
    base: str | None,
    modules_to_save: Sequence[str] = (),
) -> dict[str, Any]:
    """The fields, for adapters of the given ranks and scales on some of all modules.

    `modules_to_save` names modules that are beside them whole. Regular expressions name the
    modules: PEFT's lists of endings such as "q_proj" would have the image encoder's too.
    """
    every = list(modules)
    alpha = _number(spec.rank if spec.alpha is None else spec.alpha)
    ranks: dict[int, list[Module]] = {}
    alphas: dict[int | float, list[Module]] = {}
    for module, (rank, scale) in saved.items():
        own = _alpha(scale, rank, spec)
        if rank != spec.rank:
            ranks.setdefault(rank, []).append(module)
        if own != alpha:
            alphas.setdefault(own, []).append(module)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": alpha,
        "use_rslora": spec.rslora,
        "lora_dropout": spec.dropout,
        "target_modules": f".*({'|'.join(_patterns(saved, every))})",
        "rank_pattern": {key: value for value in ranks for key in _patterns(ranks[value], every)},
        "alpha_pattern": {key: a for a in alphas for key in _patterns(alphas[a], every)},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": list(modules_to_save) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_dora": False,
    }


def _patterns(chosen: Iterable[Module], every: Iterable[Module]) -> list[str]:
    """Regular expressions that match the ends of exactly the chosen modules' names."""
    wanted, there = _by_leaf(chosen), _by_leaf(every)
    groups: dict[tuple[str, str], list[str]] = {}
    for (tower, leaf), layers in wanted.items():
        whole = layers == there[tower, leaf]
        numbers = r"\d+" if layers and whole else "|".join(map(str, sorted(layers)))
        groups.setdefault((tower, numbers), []).append(re.escape(leaf))
    return [
        rf"{tower}\..*layers\.({numbers})\.({'|'.join(leaves)})"
        if numbers
        else rf"{tower}\.({'|'.join(leaves)})"
        for (tower, numbers), leaves in groups.items()
    ]


def _by_leaf(modules: Iterable[Module]) -> dict[tuple[str, str], set[int]]:
    """The layers of each kind of module; none for one that is in no layer."""
    found: dict[tuple[str, str], set[int]] = {}
    for module in modules:
        match = _LAYER.fullmatch(module.name)
        if match is None:
            tower, _, leaf = module.name.partition(".")
            found[tower, leaf] = set()
        else:
            found.setdefault((match["tower"], match["leaf"]), set()).add(int(match["layer"]))
    return found


def _alpha(scale: float, rank: int, spec: LoRA) -> int | float:
    """The roundest alpha that the scale, in float32, is made of."""
    exact = scale / scale_of(rank, 1, spec.rslora)
    for alpha in (round(exact), float(f"{exact:.6g}")):
        if np.float32(scale_of(rank, alpha, spec.rslora)) == np.float32(scale):
            return _number(alpha)
    return exact


def _number(value: int | float) -> int | float:
    return int(value) if value == int(value) else value
