"""adapter_config.json of PEFT: what of it we know, and all that we cannot do at once."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from paligemma_jax.models.lora_spec import scale_of

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
# Initialisations after which the base is another one.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LINEAR = re.compile(r".*(_proj|\.fc[12]|projector\.linear)")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The fields of adapter_config.json that matter, under PEFT's names."""

    r: int
    lora_alpha: int | float
    use_rslora: bool
    lora_dropout: int | float
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, int | float]
    modules_to_save: tuple[str, ...]

    def targets(self, spellings: tuple[str, ...]) -> bool:
        """Whether a module has an adapter, by PEFT's rules, under any of its names."""
        return any(self._targets(name) for name in spellings)

    def _targets(self, name: str) -> bool:
        if _matches(self.exclude_modules, name):
            return False
        if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in self.modules_to_save):
            return False
        if self.target_modules == "all-linear":
            return _LINEAR.fullmatch(name) is not None
        if not _matches(self.target_modules, name):
            return False
        if isinstance(self.target_modules, str) or not self.layers_to_transform:
            return True
        patterns = self.layers_pattern or (r"[^.]*",)
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns)
        layer = next((int(match[1]) for match in found if match), None)
        return layer in self.layers_to_transform

    def rank(self, spellings: tuple[str, ...]) -> int:
        """The rank of a module's adapter."""
        return _pattern(self.rank_pattern, spellings, self.r)

    def scale(self, spellings: tuple[str, ...]) -> float:
        """What B A of a module is multiplied by."""
        alpha = _pattern(self.alpha_pattern, spellings, self.lora_alpha)
        return scale_of(self.rank(spellings), alpha, self.use_rslora)


def parse_config(values: Mapping[str, Any]) -> tuple[AdapterConfig | None, list[str]]:
    """The configuration, and a line for everything in it that is malformed or beyond us."""
    read = _Reader(values)
    kind = values.get("peft_type")
    if kind != "LORA":
        read.refuse("peft_type", "only LORA fits")
    config = AdapterConfig(
        r=read.number("r", 8, whole=True),
        lora_alpha=read.number("lora_alpha", 8),
        use_rslora=read.flag("use_rslora"),
        lora_dropout=read.number("lora_dropout", 0.0, lowest=0, below=1),
        target_modules=read.names("target_modules"),
        exclude_modules=read.names("exclude_modules"),
        layers_to_transform=read.layers("layers_to_transform"),
        layers_pattern=_as_tuple(read.names("layers_pattern")),
        rank_pattern=read.pattern("rank_pattern", whole=True),
        alpha_pattern=read.pattern("alpha_pattern", whole=False),
        modules_to_save=_as_tuple(read.names("modules_to_save")),
    )
    if values.get("bias", "none") != "none":
        read.refuse("bias", "biases that were trained too cannot be read; 'none' fits")
    initial = values.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.startswith(_CHANGES_BASE):
        read.refuse("init_lora_weights", "such adapters change the base model too")
    known = {field.name for field in dataclasses.fields(AdapterConfig)} | _HARMLESS
    for name in values.keys() - known - {"peft_type", "bias", "init_lora_weights"}:
        if values[name] not in (None, False, "", [], {}):
            hint = "DoRA has no place here; merge it with PEFT first" if "dora" in name else None
            read.refuse(name, hint or "its meaning is not known here; null or false fits")
    return (None if read.problems else config), sorted(read.problems)


class _Reader:
    """Reads one field after the other, and keeps a list of what is wrong."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values
        self.problems: list[str] = []

    def refuse(self, name: str, why: str) -> None:
        value = self._values.get(name)
        self.problems.append(f"config      {name} is {value!r}: {why}")

    def number(
        self,
        name: str,
        default: int | float,
        whole: bool = False,
        lowest: int | float = 1e-30,
        below: int | float = 1e30,
    ) -> Any:
        value = self._values.get(name, default)
        if not _is_number(value, whole) or not lowest <= value < below:
            self.refuse(name, "a positive whole number fits" if whole else "a number fits")
            return default
        return value

    def flag(self, name: str) -> bool:
        value = self._values.get(name) or False
        if not isinstance(value, bool):
            self.refuse(name, "true or false fits")
        return bool(value)

    def names(self, name: str) -> str | tuple[str, ...]:
        """A regular expression, or a list of endings."""
        value = self._values.get(name)
        if value is None:
            return ()
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return tuple(value)
        if not isinstance(value, str):
            self.refuse(name, "a list of names, or a regular expression, fits")
            return ()
        return value if self._compiles(name, value) else ()

    def layers(self, name: str) -> tuple[int, ...]:
        value = self._values.get(name)
        value = [value] if isinstance(value, int) else value or []
        if not (isinstance(value, list) and all(_is_number(one, True) for one in value)):
            self.refuse(name, "a list of numbers of layers fits")
            return ()
        return tuple(value)

    def pattern(self, name: str, whole: bool) -> Mapping[str, Any]:
        value = self._values.get(name) or {}
        good = isinstance(value, dict) and all(
            _is_number(one, whole) and one > 0 for one in value.values()
        )
        if not good:
            self.refuse(name, "an object of names and positive numbers fits")
            return {}
        return {key: one for key, one in value.items() if self._compiles(name, key)}

    def _compiles(self, name: str, pattern: str) -> bool:
        try:
            re.compile(pattern)
        except re.error as e:
            self.refuse(name, f"{pattern!r} is no regular expression ({e})")
            return False
        return True


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (isinstance(value, int) or not whole)


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern(pattern: Mapping[str, Any], spellings: tuple[str, ...], default: Any) -> Any:
    """The value of the first key that one of the names ends with, as PEFT looks it up."""
    for key, value in pattern.items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in spellings):
            return value
    return default
