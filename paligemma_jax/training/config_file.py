"""Configuration files: "configs/x.py:size=10b,resolution=448" and `--config.x.y=value`.

A file has `get_config(arg: str) -> ConfigDict`. Values are numbers, text, and the objects of
`paligemma_jax.training.choices`, whose fields can be changed like keys; new ones are written as in
Python: --config.lora=LoRA(rank=16). Nothing but those names is ever called.
"""

import ast
import dataclasses
import difflib
import importlib.util
import os
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paligemma_jax.errors import ConfigError


def load_config(spec: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration of a file; what follows the first colon goes to its `get_config`.

    `overrides` are "name=value" or "name.field=value". Raises ConfigError, listing every override
    that does not fit.
    """
    text = os.fspath(spec)
    path, _, arg = text.partition(".py:") if ".py:" in text else (text.removesuffix(".py"), "", "")
    config = _get_config(Path(f"{path}.py").expanduser())(arg)
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"get_config of {path}.py returned {type(config).__name__}. An ml_collections "
            "ConfigDict fits. Begin with a copy of configs/base.py"
        )
    override(config, overrides)
    return config


def load_beside(file: str, name: str, arg: str = "") -> Any:
    """The ConfigDict of the file `name` beside `file`, to change and return as one's own."""
    return load_config(f"{Path(file).parent / name}:{arg}")


def parse_arg(arg: str, **defaults: Any) -> Any:
    """A ConfigDict of what the argument of a file says: "size=10b,resolution=448,final_split".

    Types are those of the defaults; a name alone means True. Raises ConfigError for others, with
    the nearest name.
    """
    found = ConfigDict(defaults)
    for entry in filter(None, (part.strip() for part in arg.split(","))):
        name, equals, value = entry.partition("=")
        if name not in defaults:
            raise ConfigError(
                f"The file's argument {name!r} is unknown.{_nearest(name, defaults)} "
                f"{' and '.join(defaults)} fit. Write for example {_example(defaults)}"
            )
        if isinstance(defaults[name], str):
            found[name] = value
        else:
            found[name] = _fit(name, parse_value(value) if equals else True, defaults[name])
    return found


def override(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Changes `config` by "name.field=value" texts; ConfigError lists all that do not fit."""
    from paligemma_jax.training.config import TrainConfig

    hints = typing.get_type_hints(TrainConfig)
    problems = []
    for text in overrides:
        name, equals, value = text.partition("=")
        try:
            if not equals:
                raise ConfigError("it has no value; write --config.name=value")
            parts = name.split(".")
            before = _child(config, parts[0], parts[0])
            changed = _changed(before, parts[1:], value, parts[0], hints.get(parts[0]))
            with config.unlocked(), config.ignore_type():
                config[parts[0]] = changed
        except ConfigError as e:
            problems.append(f"--config.{name}: {e}")
    if problems:
        listing = "\n  ".join(problems)
        raise ConfigError(
            f"{len(problems)} of the settings on the command line do not fit:\n  {listing}\n"
            "Names and values as in the configuration file fit."
        )


def parse_value(text: str) -> Any:
    """A Python literal, or a call of a name in `paligemma_jax.training.choices`; else the text."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return text
    if not any(isinstance(node, ast.Call) for node in ast.walk(tree)):
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError):
            return text
    return _evaluate(tree)


def _evaluate(node: ast.expr) -> Any:
    from paligemma_jax.training import choices

    known = {name: value for name, value in vars(choices).items() if not name.startswith("_")}
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            if name not in known:
                raise ConfigError(f"{name} is unknown.{_nearest(name, known)}")
            values = {k.arg: _evaluate(k.value) for k in keywords if k.arg}
            try:
                return known[name](*map(_evaluate, args), **values)
            except TypeError as e:
                raise ConfigError(f"{name}(...) does not fit: {e}") from e
        case ast.Tuple(elts=entries):
            return tuple(map(_evaluate, entries))
        case ast.List(elts=entries):
            return list(map(_evaluate, entries))
        case _:
            try:
                return ast.literal_eval(node)
            except ValueError as e:
                raise ConfigError(f"{ast.unparse(node)} is no literal") from e


def _changed(value: Any, path: Sequence[str], text: str, name: str, annotation: Any) -> Any:
    """`value` with the field at `path` made what `text` says."""
    if not path:
        if isinstance(value, str) and isinstance(parse_value(text), int | float):
            return text  # a name that happens to look like a number
        return _fit(name, parse_value(text), value, annotation)
    full = f"{name}.{path[0]}"
    child = _child(value, path[0], full)
    field = typing.get_type_hints(type(value)).get(path[0])
    return dataclasses.replace(value, **{path[0]: _changed(child, path[1:], text, full, field)})


def _child(value: Any, name: str, full: str) -> Any:
    if isinstance(value, ConfigDict):
        names = list(value.keys())
    elif dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.init]
    else:
        raise ConfigError(f"{full.rpartition('.')[0]} is {value!r}, which has no fields")
    if name not in names:
        raise ConfigError(
            f"there is no such setting.{_nearest(name, names)} There are: {', '.join(names)}"
        )
    return value[name] if isinstance(value, ConfigDict) else getattr(value, name)


def _fit(name: str, new: Any, old: Any, annotation: Any = None) -> Any:
    """`new` as the type of `old`; ConfigError where it is another kind of thing."""
    if isinstance(old, bool) or isinstance(new, bool):
        fits = isinstance(new, bool) and (isinstance(old, bool) or old is None)
    elif isinstance(old, float) and isinstance(new, int):
        return float(new)
    elif old is None or new is None:
        optional = annotation is None or type(None) in typing.get_args(annotation) or old is None
        fits = optional and not (new is not None and _refused(new, annotation))
    elif isinstance(old, int | float | str):
        fits = isinstance(new, type(old)) or annotation is typing.Any
    else:
        fits = not isinstance(new, int | float | str) or _plain(annotation)
    if not fits:
        raise ConfigError(
            f"{new!r} is {_kind(new)}; {_kind(old)} such as {old!r} fits"
            if old is not None
            else f"{new!r} does not fit {annotation}"
        )
    return new


def _refused(new: Any, annotation: Any) -> bool:
    """Whether a plain value is given where its type is not among those of the field."""
    options = typing.get_args(annotation)
    plain = [option for option in options if option in (int, float, str, bool)]
    if not isinstance(new, int | float | str) or not options:
        return False
    return not any(isinstance(new, (int, float) if kind is float else kind) for kind in plain)


def _plain(annotation: Any) -> bool:
    return annotation is typing.Any or any(
        k in (int, float, str) for k in typing.get_args(annotation)
    )


def _kind(value: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    return names.get(type(value), f"a {type(value).__name__}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def _example(defaults: Mapping[str, Any]) -> str:
    name, value = next(iter(defaults.items()))
    return f"{name}={value}"


def _get_config(path: Path) -> Any:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        names = sorted(str(folder / entry.name) for entry in folder.glob("*.py"))
        raise ConfigError(
            f"There is no configuration file {path}.{_nearest(str(path), names)} A Python file "
            "with get_config(arg) fits. See configs/base.py"
        )
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(
            f"{path} has no function get_config. A file with get_config(arg), which returns a "
            "ConfigDict, fits. Begin with a copy of configs/base.py"
        )
    return get_config
