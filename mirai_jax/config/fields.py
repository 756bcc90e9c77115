"""Typed, checked access to the fields of a nested dictionary; every refusal is one line.

`config/schema.py` says which fields there are and what they may be; this file says how a wrong one is told:
its name, its value and what is allowed.
"""

import math
import typing
import unicodedata
from collections.abc import Mapping
from typing import Any

from mirai_jax.utils.errors import ConfigError


def shown(value: Any) -> str:
    """The value as a message can hold it: its repr in one line, cut where it is long."""
    try:
        text = " ".join(repr(value).splitlines())
    except Exception:  # anything may be in a config file: an int of 5,000 digits has no repr
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def require(good: bool, field: str, value: Any, allowed: str) -> None:
    """Raises ConfigError("<field> is <value>; it must be <allowed>") unless `good`."""
    if not good:
        raise ConfigError(f"{field} is {shown(value)}; it must be {allowed}")


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
_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # Unicode: control, half a surrogate pair, ends of lines


def typed(field: str, value: Any, kind: type) -> Any:
    """The value as `kind`; an int passes for a float, a list for a tuple, nothing else is bent.

    Numbers must be ones that the step can hold, in int32 and float32.
    """
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= 3e38 else math.inf
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    require(good, field, value, _KINDS[kind])
    if kind is int:
        require(abs(value) < 2**31, field, value, "a whole number of at most 31 bits")
    if kind is float:
        held = value == 0 or 1e-37 <= abs(value) <= 3e38  # not so of NaN
        require(held, field, value, "a number: 0, or 1e-37 to 3e38 in size")
    if kind is str:
        good = not any(unicodedata.category(c) in _CONTROL for c in value)
        require(good, field, value, "a string without control characters")
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

    def number(self, field: str, kind: type, low: float, high: float = math.inf) -> Any:
        """An int or float between `low` and `high`, both allowed."""
        value = self.get(field, kind)
        top = "" if high == math.inf else f" and at most {high}"
        require(low <= value <= high, self.name(field), value, f"at least {low}{top}")
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
                name = shown(self.name(str(field)))
                raise ConfigError(
                    f"config field {name} (given {shown(self._values[field])}) does not exist; the "
                    f"fields here are {', '.join(self._asked)}"
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
    return tuple(typed(field, v, int) for v in value)


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


# Fields that came later than some workdirs, with the value that these were computed with.
_ADDED = {"model": {"attention": "auto"}}
_ADDED_TO_TERMS = {"targets": "own"}


def completed(config: Any) -> Any:
    """What a config.json holds, with the fields that did not exist when it was written.

    Anything that is not shaped like a config is left as it is, for the reader to refuse.
    """
    if not isinstance(config, Mapping):
        return config
    config = dict(config)
    for name, added in _ADDED.items():
        if isinstance(config.get(name), Mapping):
            config[name] = {**added, **config[name]}
    terms = config.get("foresight")
    if isinstance(terms, (list, tuple)):
        config["foresight"] = [
            {**_ADDED_TO_TERMS, **term} if isinstance(term, Mapping) else term for term in terms
        ]
    return config
