"""What adapter_config.json says of our adapters, in words that hold for every version's names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_jax.models.lora_spec import LoRA, scale_of
from paligemma_jax.weights.peft_names import Module

_LAYER = re.compile(r"(?P<tower>.+?)\.(?:encoder\.)?layers\.(?P<layer>\d+)\.(?P<leaf>.+)")


def config_values(
    spec: LoRA,
    saved: Mapping[Module, tuple[int, float]],
    modules: Iterable[Module],
    base: str | None,
    modules_to_save: Sequence[str] = (),
) -> dict[str, Any]:
    """The fields, for adapters of the given ranks and scales on some of all modules.

    `modules_to_save` names modules that are beside them whole.

    Regular expressions name the modules: PEFT's lists of endings such as "q_proj" would have the
    image encoder's too.
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
        if not layers:
            numbers = ""
        elif layers == there[tower, leaf]:
            numbers = r"\d+"
        else:
            numbers = "|".join(map(str, sorted(layers)))
        groups.setdefault((tower, numbers), []).append(re.escape(leaf))
    return [
        rf"{tower}\..*layers\.({numbers})\.({'|'.join(leaves)})"
        if numbers
        else rf"{tower}\.({'|'.join(leaves)})"
        for (tower, numbers), leaves in groups.items()
    ]


def _by_leaf(modules: Iterable[Module]) -> dict[tuple[str, str], set[int]]:
    """The layers of each kind of module; none for one that is of no layer."""
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
