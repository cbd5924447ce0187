# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Configurations: frozen dataclasses from YAML and `key=value`, and nothing that is not in them.

    base (a dataclass) ── YAML over it ── data.size=512 loss.perceptual=0.5 over that ── checked ──> the same class

An unknown key is an error that names the nearest valid one; a value of the wrong type, or one that the class itself
refuses (`__post_init__`), is one that names the key. `to_yaml` writes what `read` gives back. Types are checked by
pydantic, which knows the standard library's dataclasses; the classes know nothing of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

_TYPES = {  # pydantic's errors by the first word of their names
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "a string",
    "tuple": "a list",
    "dict": "a mapping",
}

__all__ = ["ConfigError", "differences", "read", "read_yaml", "to_yaml"]

T = TypeVar("T")
Tree = dict[str, Any]


class ConfigError(ValueError):
    """A configuration that says something unknown or impossible; the message names the key."""


def read(base: T, tree: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> T:
    """`base` with the values of `tree` (nested as a YAML file's), then of `overrides` ("data.size=512", values as YAML
    writes them). ConfigError for a key that the classes do not have and for a value that is not of its type."""
    merged = _plain(base)
    _lay_over(merged, dict(tree or {}), type(base), "")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{override!r}: expected key=value, such as data.size=512")
        value: Any = _yaml(text, f"{key}: ")
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        _lay_over(merged, value, type(base), "")
    return _checked(type(base), merged)


def read_yaml(path: str | Path) -> Tree:
    """The mapping in a YAML file, {} of an empty one. ConfigError naming the file, and the line where YAML ends."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"configuration {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read configuration {path}: {error}") from error
    tree = _yaml(text, f"configuration {path}: ")
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"configuration {path}: expected `key: value` lines, got {type(tree).__name__}")
    return tree


def to_yaml(config: Any) -> str:
    """All values of a dataclass, nested, in the order of its fields."""
    import yaml

    return yaml.safe_dump(_listed(_plain(config)), sort_keys=False, allow_unicode=True, width=120)


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value of old, value of new), of two configurations of one class."""
    before, after = dict(_leaves(_plain(old), "")), dict(_leaves(_plain(new), ""))
    keys = [*before, *(key for key in after if key not in before)]
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{where}this is no YAML{line}: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:  # a date that does not exist, nesting without end
        raise ConfigError(f"{where}this is no YAML: {error}") from None


def _plain(value: Any) -> Any:
    """Dataclasses to dicts; tuples stay, a union tells them from a number."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return dict(value) if isinstance(value, Mapping) else value


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (tuple, list)) else value


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{where}.{key}" if where else key)
    else:
        yield where, value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass that a field holds, Optional ones included."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def _lay_over(base: Tree, tree: Mapping[str, Any], kind: type, where: str) -> None:
    """Writes tree's values into base in place; keys are those of the dataclass `kind`."""
    hints = _hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key, value in tree.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in names:
            raise ConfigError(_unknown(path, str(key), names, where))
        inner = _dataclass_of(hints[key])
        if inner is not None and isinstance(value, Mapping):
            if not isinstance(base.get(key), dict):  # an Optional that was None
                base[key] = {}
            _lay_over(base[key], value, inner, path)
        elif inner is not None and value is not None:
            fields = ", ".join(f.name for f in dataclasses.fields(inner))
            raise ConfigError(f"{path}: expected keys under it ({fields}), got {value!r}")
        elif isinstance(base.get(key), dict) and isinstance(value, Mapping):
            base[key] = {**base[key], **value}  # a mapping of names: those given, over those there
        else:
            base[key] = value


def _unknown(path: str, key: str, names: list[str], where: str) -> str:
    near = difflib.get_close_matches(key, names, 1, 0.5)
    prefix = f"{where}." if where else ""
    hint = f"did you mean {prefix}{near[0]}?" if near else f"{where or 'the configuration'} has {', '.join(names)}"
    return f"{path}: there is no such key; {hint}"


def _booleans(value: Any, hint: Any, where: str) -> None:
    """True is an int to Python, and to pydantic; not to somebody who wrote `steps: yes`."""
    if isinstance(value, bool) and (hint in (int, float) or bool not in (*typing.get_args(hint), hint)):
        expected = _TYPES.get(getattr(hint, "__name__", ""), f"a value of {hint}")
        raise ConfigError(f"{where}: expected {expected}, got {value!r}")


def _check_booleans(kind: type, tree: Tree, where: str) -> None:
    for name, hint in _hints(kind).items():
        path = f"{where}.{name}" if where else name
        inner = _dataclass_of(hint)
        if inner is not None and isinstance(tree.get(name), dict):
            _check_booleans(inner, tree[name], path)
        elif name in tree:
            _booleans(tree[name], hint, path)


def _checked(kind: type[T], tree: Tree) -> T:
    import pydantic

    _check_booleans(kind, tree, "")
    try:
        return pydantic.TypeAdapter(kind).validate_python(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(_told(error.errors(include_url=False), kind)) from None


def _told(errors: Sequence[Any], kind: type) -> str:
    """The first error that stands for a value, in a sentence. A union reports every member's reason at one place."""
    first = errors[0]
    keys: list[str] = []
    inner: type | None = kind
    for part in first["loc"]:
        if inner is None or not isinstance(part, str) or part not in _hints(inner):
            if isinstance(part, str) and keys and part not in ("int", "float", "str", "bool", "none"):
                keys.append(part)
            break
        keys.append(part)
        inner = _dataclass_of(_hints(inner)[part])
    where = ".".join(keys)
    if first["type"] == "value_error" and "ctx" in first:  # what the class itself says names the field
        text = str(first["ctx"]["error"])
        return f"{where}: {text}" if where else text
    expected = _TYPES.get(first["type"].split("_")[0], first["msg"].removeprefix("Input should be "))
    return f"{where}: expected {expected}, got {first['input']!r}"
