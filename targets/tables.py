"""Folders of TOML files that ship with the package: their names, and each file as a record that has its file's name."""

import sys
from collections.abc import Sequence
from importlib import resources
from typing import Protocol, TypeVar

from galerne import schema
from galerne.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Named(Protocol):
    """A record with the name of its file."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def names(package: str) -> list[str]:
    """Return the stems of a package's TOML files, sorted."""
    files = (item.name for item in resources.files(package).iterdir())
    return sorted(file.removesuffix(".toml") for file in files if file.endswith(".toml"))


def text(package: str, name: str) -> str:
    """Return the text of one of them."""
    return (resources.files(package) / f"{name}.toml").read_text("utf-8")


def parse(cls: type[N], text: str, name: str, where: str, filled: Sequence[str]) -> N:
    """Read a file's text as a record.

    Args:
        name: the file's stem, which the record's `name` must be.
        where: what to call the file in an error.
        filled: fields that must not be empty.
    Raises: InputError naming the file and the field.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InputError(f"{where}: not TOML ({exc})") from exc
    record = schema.read(cls, tree, where)
    if record.name != name:
        raise InputError(f"{where}: name: expected {name!r}, the file's own name, found {record.name!r}")
    for field in filled:
        if not getattr(record, field):
            raise InputError(f"{where}: {field}: expected something, found {getattr(record, field)!r}")
    return record
