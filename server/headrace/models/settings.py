"""Typed, bounded reading of settings that somebody else wrote: config.json or GGUF metadata.

Called by `config_hf.py` and `config_gguf.py`. A value of the wrong type or out of its range is a ModelFileError that
names the file, the key and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from headrace.models.errors import ModelFileError, UnsupportedModelError
from headrace.models.files import clip


class Required:
    """Marks a setting that has no default."""


REQUIRED: Final = Required()


class Settings:
    """Settings of one file. Keys that are absent, or null in JSON, take the default given."""

    def __init__(self, values: Mapping[str, object], file_name: str, prefix: str = "") -> None:
        self._values = values
        self._file_name = file_name
        self._prefix = prefix

    def has(self, key: str) -> bool:
        return self._values.get(self._prefix + key) is not None

    def integer(
        self, key: str, low: int, high: int, default: int | Required = REQUIRED, *, per_layer: bool = False
    ) -> int:
        """An integer in low..high. per_layer: a list of equal integers (GGUF has such) counts as one."""
        value = self._get(key, default)
        if per_layer and not isinstance(value, (int, str)):
            value = self._only(key, value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(key, f"an integer in {low}..{high}", value)
        return value

    def number(self, key: str, low: float, high: float, default: float | Required = REQUIRED) -> float:
        """A finite number in low..high."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.bad(key, f"a number in {low:g}..{high:g}", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false", value)
        return value

    def text(self, key: str, default: str | Required = REQUIRED) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.bad(key, "a string", value)
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty where absent."""
        value = self._values.get(self._prefix + key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.bad(key, "a list of strings", value)
        return value

    def group(self, key: str) -> Settings | None:
        """A nested object, or None where absent."""
        value = self._values.get(self._prefix + key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.bad(key, "an object", value)
        return Settings(value, self._file_name)

    def flags(self, key: str, count: int) -> list[bool] | None:
        """`count` booleans, or None where the key is absent or no list."""
        value: Any = self._values.get(self._prefix + key)
        if value is None or isinstance(value, (bool, int, float, str)):
            return None
        items = value.tolist() if hasattr(value, "tolist") else list(value)
        if len(items) != count or not all(isinstance(item, (bool, int)) and item in (0, 1) for item in items):
            raise self.bad(key, f"a list of {count} booleans", items)
        return [bool(item) for item in items]

    def names(self) -> list[str]:
        """All keys, without the prefix."""
        return [key[len(self._prefix) :] for key in self._values if key.startswith(self._prefix)]

    def bad(self, key: str, expected: str, value: object) -> ModelFileError:
        found = "missing" if value is None else clip(repr(value))
        return ModelFileError(f"{self._file_name}: {self._prefix}{key} must be {expected}, not {found}")

    def inconsistent(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._file_name}: {what}")

    def unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._file_name}: {what} is not supported")

    def _get(self, key: str, default: object) -> object:
        value = self._values.get(self._prefix + key)
        if value is None:
            if isinstance(default, Required):
                raise ModelFileError(f"{self._file_name}: {self._prefix}{key} is missing")
            return default
        return value

    def _only(self, key: str, value: Any) -> object:
        if not hasattr(value, "__len__"):
            return value
        items = value.tolist() if hasattr(value, "tolist") else list(value)
        if any(item != items[0] for item in items):
            raise self.unsupported(f"{self._prefix}{key} that differs from layer to layer")
        return items[0] if items else None
