"""Config dataclasses from plain mappings and back: YAML, overrides, and errors that name a setting by its path.

An unknown key is an error that names the nearest known one; so is a value of the wrong type.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from megatron_xalign.errors import ConfigError

ConfigType = TypeVar("ConfigType")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file of settings as plain values.

    Raises:
        ConfigError: it is missing, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}.") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} holds a {type(tree).__name__}; a mapping of settings is expected.")
    return tree


def from_tree(target: type[ConfigType], tree: Mapping[str, Any], path: str = "") -> ConfigType:
    """Build a config dataclass from plain mappings; errors carry the dotted path of the setting."""
    upgrade = getattr(target, "from_older", None)
    if upgrade is not None:
        tree = upgrade(tree, path)
    hints = typing.get_type_hints(target)
    known = [item.name for item in dataclasses.fields(typing.cast(Any, target))]
    values = {}
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {path}{near[0]}?" if near else f"known here: {', '.join(known)}."
            raise ConfigError(f"unknown setting {path}{key}; {hint}")
        values[key] = _convert(hints[key], value, f"{path}{key}")
    missing = [
        item.name
        for item in dataclasses.fields(typing.cast(Any, target))
        if item.name not in values
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{path}{missing[0]} is missing.")
    try:
        return target(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from None


def to_tree(config: object) -> Any:
    """Turn a config dataclass into plain mappings and lists, every setting included."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {item.name: to_tree(getattr(config, item.name)) for item in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_tree(item) for item in config]
    if isinstance(config, dict):
        return {key: to_tree(value) for key, value in config.items()}
    return config


def to_yaml(config: object) -> str:
    """The resolved config as YAML that ``read_config`` reads back to an equal object."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put a ``path.to.key=value`` of the command line into a tree; the value is YAML.

    Raises:
        ConfigError: it is not of that form, or leads through a value or beyond a list.
    """
    dotted, separator, text = override.partition("=")
    if not separator or not dotted.strip():
        raise ConfigError(f"--set {override} is not of the form path.to.key=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from None
    *parents, leaf = dotted.strip().split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, list):
            node = node[_list_index(node, parent, override)]
        else:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
        if not isinstance(node, (dict, list)):
            raise ConfigError(f"--set {override}: {parent} is a value, not a group of settings.")
    if isinstance(node, list):
        node[_list_index(node, leaf, override)] = value
    else:
        node[leaf] = value


def _list_index(items: list[Any], text: str, override: str) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise ConfigError(f"--set {override}: {text} is not an item number below {len(items)}.")
    return int(text)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """``value`` from YAML as the type a field is declared with; ConfigError if it does not fit."""
    if hint is Any:
        return value
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        choices = [choice for choice in get_args(hint) if choice is not type(None)]
        if value is None and type(None) in get_args(hint):
            return None
        # A word or a group of settings: precision: bf16, precision: {fp8: {...}}.
        groups = [choice for choice in choices if dataclasses.is_dataclass(choice)]
        if not groups:
            return _convert(choices[0], value, path)
        if isinstance(value, dict):
            return _convert(groups[0], value, path)
        words = next((choice for choice in choices if get_origin(choice) is Literal), None)
        if words is None or value not in get_args(words):
            inside = " or ".join(item.name for item in dataclasses.fields(groups[0]))
            said = "should be a" if words is None else f"is not one of {', '.join(map(str, get_args(words)))} and no"
            raise ConfigError(f"{path}={value!r} {said} group of settings ({path}: {{{inside}: ...}}).")
        return value
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{path}={value!r} is not one of {', '.join(map(str, get_args(hint)))}.")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}={value!r} should be a list.")
        return tuple(_convert(get_args(hint)[0], item, f"{path}.{index}") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}={value!r} should be a mapping.")
        return {str(key): _convert(get_args(hint)[1], item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ConfigError(f"{path}={value!r} should be a group of settings.")
        return from_tree(hint, value, f"{path}.")
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3 as text
            return float(value)
        except ValueError:
            pass
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{path}={value!r} should be {hint.__name__}, not {type(value).__name__}.")
