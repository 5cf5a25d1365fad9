"""Reads fields of a checkpoint's `config.json` with errors that name the field."""

import math
from collections.abc import Mapping
from typing import Any

from galerne.errors import InputError


class ConfigReader:
    """A table of `config.json`. Unknown fields are ignored.

    where: the file and the table in it, as errors name them.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self.where = config, where

    def has(self, key: str) -> bool:
        """Return whether a field is there and not null."""
        return self._config.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; `default` stands in where the field is absent or null."""
        value = self._config.get(key)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.where}: {key}: missing; expected an integer")
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise InputError(f"{self.where}: {key}: expected a positive integer, found {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive, finite number; `default` stands in where the field is absent or null."""
        value = self._config.get(key)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.where}: {key}: missing; expected a number")
        if not _is_positive(value):
            raise InputError(f"{self.where}: {key}: expected a positive number, found {value!r}")
        return float(value)

    def numbers(self, key: str, count: int) -> list[float]:
        """Return a list of `count` positive numbers."""
        values = self._config.get(key)
        if not isinstance(values, list) or len(values) != count or not all(map(_is_positive, values)):
            raise InputError(f"{self.where}: {key}: expected a list of {count} positive numbers, found {values!r}")
        return [float(value) for value in values]

    def nullable_integer(self, key: str) -> int | None:
        """Return a positive integer or None; the field must be there, since leaving it out changes the answer."""
        if key not in self._config:
            raise InputError(f"{self.where}: {key}: missing; expected an integer or null")
        return None if self._config[key] is None else self.integer(key)

    def nullable_number(self, key: str) -> float | None:
        """Return a positive number or None; the field must be there, since leaving it out changes the answer."""
        if key not in self._config:
            raise InputError(f"{self.where}: {key}: missing; expected a number or null")
        return None if self._config[key] is None else self.number(key)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return true or false; `default` stands in where the field is absent or null."""
        value = self._config.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {key}: expected true or false, found {value!r}")
        return value

    def text(self, key: str) -> str | None:
        """Return a string; None where the field is absent or null."""
        value = self._config.get(key)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{self.where}: {key}: expected a string, found {value!r}")
        return value

    def table(self, key: str) -> "ConfigReader | None":
        """Return a table within this one; None where it is absent, null or empty."""
        value = self._config.get(key)
        return self.table_of(key, value) if value or not isinstance(value, dict | None) else None

    def table_of(self, key: str, value: object) -> "ConfigReader":
        """Return a value as the table that a field of this one holds."""
        if not isinstance(value, Mapping):
            raise InputError(f"{self.where}: {key}: expected a table, found {value!r}")
        return ConfigReader(value, f"{self.where}: {key}")

    def layer_types(self, layers: int) -> list[str] | None:
        """Return the type of each of `layers` layers, full_attention or sliding_attention; None without the field."""
        kinds, known = self._config.get("layer_types"), ("sliding_attention", "full_attention")
        if kinds is None:
            return None
        if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
            raise InputError(
                f"{self.where}: layer_types: expected a list of {layers}, each {' or '.join(known)}, found {kinds!r}"
            )
        return kinds

    def expect(self, key: str, wanted: object) -> None:
        """Refuse a config whose field has another value than the decoder implements; absent or null passes."""
        value = self._config.get(key)
        if value is not None and value != wanted:
            raise InputError(f"{self.where}: {key}: {value!r} is not supported; expected {wanted!r}")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return a token id or a list of them; absent or null gives none."""
        value = self._config.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
            raise InputError(f"{self.where}: {key}: expected a token id or a list of them, found {value!r}")
        return tuple(values)


def _is_positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0  # type: ignore[arg-type,operator]
