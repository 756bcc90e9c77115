"""Typed, checked access to the fields of a nested dictionary; every refusal is one line.

`config.py` says which fields there are and what they may be; this file says how a wrong one is told:
its name, its value and what is allowed.
"""

import typing
from collections.abc import Mapping
from typing import Any

from mirai_jax.errors import ConfigError


def require(good: bool, field: str, value: Any, allowed: str) -> None:
    """Raises ConfigError("<field> is <value>; it must be <allowed>") unless `good`."""
    if not good:
        raise ConfigError(f"{field} is {value!r}; it must be {allowed}")


def choice(field: str, value: str, allowed: typing.Iterable[str], more: str = "") -> None:
    """Requires one of `allowed`; `more` ends the message."""
    require(
        value in allowed, field, value, " ".join(["one of " + ", ".join(allowed), more]).strip()
    )


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    tuple: "a tuple",
}


def typed(field: str, value: Any, kind: type) -> Any:
    """The value as `kind`; an int passes for a float, a list for a tuple, nothing else is bent."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{field} is a number of {value.bit_length()} bits; it must fit in 64")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if good and kind is float:
        good = value == value and abs(value) != float("inf")
    require(good, field, value, _KINDS[kind])
    return value


class Section:
    """One level of the config: hands out typed fields, and knows which were asked for."""

    def __init__(self, path: str, values: Any):
        require(isinstance(values, Mapping), path, values, "a group of fields")
        self._path, self._values = path, values
        self._sections: list[Section] = []
        self._asked: list[str] = []

    def name(self, field: str) -> str:
        """The whole path of a field here, as it is overridden."""
        return f"{self._path}.{field}" if self._path else field

    def raw(self, field: str) -> Any:
        """The value as it is; a field that is not there is told by name."""
        self._asked.append(field)
        if field not in self._values:
            raise ConfigError(f"config field {self.name(field)} is missing")
        return self._values[field]

    def get(self, field: str, kind: type) -> Any:
        """The value as an int, float, bool, str or tuple."""
        return typed(self.name(field), self.raw(field), kind)

    def number(self, field: str, kind: type, low: float, high: float = float("inf")) -> Any:
        """An int or float between `low` and `high`, both allowed."""
        value = self.get(field, kind)
        top = "" if high == float("inf") else f" and at most {high:g}"
        require(low <= value <= high, self.name(field), value, f"at least {low:g}{top}")
        return value

    def choice(self, field: str, allowed: typing.Iterable[str]) -> str:
        """A string that is one of `allowed`."""
        value = self.get(field, str)
        choice(self.name(field), value, allowed)
        return value

    def section(self, field: str) -> "Section":
        """The group of fields below `field`."""
        self._sections.append(Section(self.name(field), self.raw(field)))
        return self._sections[-1]

    def sections(self, field: str) -> list["Section"]:
        """The entries of a tuple of groups: `field[0]`, `field[1]`, ..."""
        entries = enumerate(self.get(field, tuple))
        made = [Section(f"{self.name(field)}[{i}]", values) for i, values in entries]
        self._sections += made
        return made

    def refuse_unknown(self) -> None:
        """Raises for a field, here or below, that nothing asked for: it would be ignored."""
        for field in self._values:
            if field not in self._asked:
                raise ConfigError(
                    f"config field {self.name(str(field))} (given {self._values[field]!r}) does not "
                    f"exist; the fields here are {', '.join(self._asked)}"
                )
        for section in self._sections:
            section.refuse_unknown()


def probability(section: Section, field: str) -> float:
    value = section.get(field, float)
    require(0 <= value < 1, section.name(field), value, "at least 0 and less than 1")
    return value


def pair(field: str, value: Any) -> tuple[int, int]:
    good = isinstance(value, (tuple, list)) and len(value) == 2
    good = good and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    require(good, field, value, "a pair of whole numbers")
    return tuple(value)


def numbers(field: str, values: Any, size: int | None = None) -> tuple[float, ...]:
    good = isinstance(values, (tuple, list)) and (size is None or len(values) == size)
    require(good, field, values, "a tuple of numbers" if size is None else f"{size} numbers each")
    return tuple(typed(field, v, float) for v in values)


def plain(config: Any) -> Any:
    """ConfigDicts inside tuples too, as plain dictionaries."""
    if hasattr(config, "items"):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return tuple(plain(value) for value in config)
    return config
