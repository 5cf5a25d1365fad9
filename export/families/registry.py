"""Finds the family that reads a config: every other module of this folder is one."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol, cast

import galerne.export.families
from galerne.errors import InputError
from galerne.export.reader import ConfigReader
from galerne.export.spec import DecoderSpec


class Family(Protocol):
    """What a family's module offers."""

    ARCHITECTURE: str

    def spec(self, config: ConfigReader) -> DecoderSpec: ...


def families() -> dict[str, Family]:
    """Return the families by the architecture's name in `config.json`."""
    modules = [
        importlib.import_module(f"{galerne.export.families.__name__}.{info.name}")
        for info in pkgutil.iter_modules(galerne.export.families.__path__)
        if info.name != "registry"
    ]
    return {module.ARCHITECTURE: cast(Family, module) for module in modules}


def read_spec(config: Mapping[str, Any], where: str) -> DecoderSpec:
    """Return the spec of the model that a `config.json` describes.

    Raises: InputError if the architecture is not supported, or a field is missing or not supported.
    """
    known = families()
    names = config.get("architectures") or []
    for name in names if isinstance(names, list) else []:
        if name in known:
            return known[name].spec(ConfigReader(config, where))
    raise InputError(f"{where}: architectures: {names!r} is not supported; supported: {', '.join(sorted(known))}")
