"""Reads a mapping (from JSON or TOML) into a frozen dataclass, strictly, with errors that name the field.

One small reader serves the manifest, the target files and the recipes, so that all three refuse an unknown key, a
missing one or a value of the wrong type in the same words.
"""

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from galerne.errors import InputError

T = TypeVar("T")
# Metadata of a field that came after files were written: left out while it holds its default, so that such files stay the same.
LATER = {"later": True}


def read(cls: type[T], data: object, where: str) -> T:
    """Build a dataclass from a mapping.

    Args:
        cls: a dataclass whose fields are int, float, str, bool, None, Literal, unions, list[...], tuple[..., ...],
            dict[str, ...] and other dataclasses.
        data: the parsed mapping.
        where: what to call it in an error, such as the file and the table's name.
    Raises: InputError naming the field, the value found and what was expected.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected a table, found {data!r}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise InputError(f"{where}: unknown key {key!r}; allowed: {', '.join(fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: missing key {name!r}")
    return cls(**values)


def read_json(cls: type[T], data: bytes, where: str, version: int, remedy: str) -> T:
    """Build a dataclass from JSON that carries a `schema_version`.

    Args:
        version: the one that this code reads.
        remedy: what to do about a file of another version, such as how to make it anew.
    Raises: InputError if it is no JSON, of another version, or as `read` says.
    """
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{where}: not JSON ({exc}); {remedy}") from exc
    found = tree.get("schema_version") if isinstance(tree, dict) else None
    if found != version:
        raise InputError(f"{where}: schema_version: expected {version}, found {found!r}; {remedy}")
    return read(cls, tree, where)


def to_json(record: Any) -> bytes:
    """Return a dataclass as UTF-8 JSON; the same record gives the same bytes."""
    return (json.dumps(tree(record), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def tree(value: Any) -> Any:
    """Return a dataclass as tables, lists and plain values, without its fields marked LATER that hold an empty default."""
    if dataclasses.is_dataclass(value):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: tree(item) for field, item in fields if item or not field.metadata.get("later")}
    if isinstance(value, Mapping):
        return {key: tree(item) for key, item in value.items()}
    return [tree(item) for item in value] if isinstance(value, list | tuple) else value


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or (hint is type(None) and value is None):
        return value
    if origin in (Union, types.UnionType):
        return _any_of(args, value, where)
    if origin is Literal:
        if any(type(value) is type(arg) and value == arg for arg in args):  # 1 and True are equal, yet not the same
            return value
        raise InputError(f"{where}: expected one of {', '.join(map(str, args))}, found {value!r}")
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _value(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return read(hint, value, where)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _finite(value, where)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise InputError(f"{where}: expected {_name(hint)}, found {value!r}")


def _finite(value: float, where: str) -> float:
    # Against NaN every comparison is false, so a limit that is NaN would let anything pass.
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{where}: expected a finite number, found {number}")
    return number


def _any_of(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    rest = [arg for arg in args if arg is not type(None)]
    if len(rest) == 1:
        return _value(rest[0], value, where)
    for arg in rest:
        try:
            return _value(arg, value, where)
        except InputError:
            continue
    raise InputError(f"{where}: expected {' or '.join(map(_name, args))}, found {value!r}")


def _name(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (list, tuple):
        return f"a list of {_name(get_args(hint)[0])}"
    if origin is dict:
        return "a table"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
