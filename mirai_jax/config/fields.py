"""A config field in one line: its type, default, bounds, and whether a resumed run may change it.

    @dataclasses.dataclass(frozen=True)
    class OptimizerFields:
        learning_rate: float = field(1e-4, at_least=0)
        schedule: str = field("constant", choices=SCHEDULES)

A group of fields is a dataclass. A field of it may be another group (`optimizer: OptimizerFields`) or
a tuple of groups (`foresight: tuple[TermFields, ...]`). `read` checks a config against such a dataclass:
a field that the config lacks takes its default, a field that the dataclass lacks is an error.
"""

import dataclasses
import math
import re
import types
import typing
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from mirai_jax.utils.errors import ConfigError
from mirai_jax.utils.trees import plain, shown

DTYPES = ("float32", "bfloat16")  # of matrix products

T = TypeVar("T")
Check = Callable[[str, Any, str], None]  # `check` of a config


def field(
    default: Any = dataclasses.MISSING,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    choices: Iterable[str] = (),
    resumable: bool = False,
) -> Any:
    """Declares a field of a config.

    Args:
        default: of a config without the field: what runs from before the field existed computed with.
            A field without a default is required.
        resumable: whether a run may resume with another value.
    """
    bounds = {"at least": at_least, "at most": at_most, "less than": below}
    allowed = " and ".join(f"{word} {n}" for word, n in bounds.items() if math.isfinite(n))
    if choices:
        allowed = "one of " + ", ".join(choice or "''" for choice in choices)

    def good(value: Any) -> bool:
        return value in choices if choices else at_least <= value <= at_most and value < below

    metadata = {"good": good, "allowed": allowed, "resumable": resumable}
    return dataclasses.field(default=default, metadata=metadata)


def read(group: type[T], config: Any) -> T:
    """Reads a config: a ConfigDict, or the dictionary of a workdir's config.json.

    Raises:
        ConfigError: the first wrong, unknown or missing field, in one line.
    """
    try:
        config = plain(config)
    except RecursionError:
        raise ConfigError("the config holds itself, or groups of fields nested too deep") from None
    return _read(group, config, "")


def _read(group: type[T], values: Any, path: str) -> T:
    require(isinstance(values, Mapping), path or "the config", values, "a group of fields")
    known = {declared.name: declared for declared in dataclasses.fields(group)}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(
                f"config field {shown(_join(path, str(name)))} (given {shown(value)}) does not exist; "
                f"the fields here are {', '.join(known)}"
            )
    made = {}
    for name, declared in known.items():
        where = _join(path, name)
        if inner := _group_of(declared):
            made[name] = _read(inner, values.get(name, {}), where)
        elif name not in values:
            if declared.default is dataclasses.MISSING:
                raise ConfigError(f"config field {where} is missing")
            made[name] = declared.default
        elif inner := _entries_of(declared):
            entries = enumerate(typed(where, values[name], tuple))
            made[name] = tuple(_read(inner, entry, f"{where}[{i}]") for i, entry in entries)
        else:
            made[name] = typed(where, values[name], declared.type)
            rule = declared.metadata
            if rule["allowed"]:
                require(rule["good"](made[name]), where, made[name], rule["allowed"])
    return group(**made)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _group_of(declared: dataclasses.Field) -> type | None:
    return declared.type if dataclasses.is_dataclass(declared.type) else None


def _entries_of(declared: dataclasses.Field) -> type | None:
    """The group of each entry, of a field that is a tuple of groups."""
    entry = (*typing.get_args(declared.type), None)[0]
    return entry if dataclasses.is_dataclass(entry) else None


def complete(group: type, config: Any) -> Any:
    """The config with the default of every field that it lacks. What has another shape is left as is."""
    if not isinstance(config, Mapping):
        return config
    made = dict(config)
    for declared in dataclasses.fields(group):
        name = declared.name
        if inner := _group_of(declared):
            made[name] = complete(inner, config.get(name, {}))
        elif declared.default is not dataclasses.MISSING:
            made.setdefault(name, declared.default)
        if (inner := _entries_of(declared)) and isinstance(made[name], (tuple, list)):
            made[name] = type(made[name])(complete(inner, entry) for entry in made[name])
    return made


def resumable(group: type, path: str = "") -> Iterator[str]:
    """The names of the fields that a resumed run may change; of terms 'foresight[].checkpoint'."""
    for declared in dataclasses.fields(group):
        where = _join(path, declared.name)
        if inner := _group_of(declared):
            yield from resumable(inner, where)
        elif inner := _entries_of(declared):
            yield from resumable(inner, f"{where}[]")
        elif declared.metadata.get("resumable"):
            yield where


def fill(cls: type[T], given: Any, **more: Any) -> T:
    """A dataclass made of the attributes of `given` that have its fields' names, and of `more`."""
    names = {f.name for f in dataclasses.fields(cls)} - more.keys()
    return cls(**{name: getattr(given, name) for name in names if hasattr(given, name)}, **more)


def require(good: Any, name: str, value: Any, allowed: str) -> None:
    """Raises ConfigError("<name> is <value>; it must be <allowed>") unless `good`."""
    if not good:
        raise ConfigError(f"{name} is {shown(value)}; it must be {allowed}")


def check(config: Any, name: str, good: Any, allowed: str) -> None:
    """`require`, with the value that the config (as `read` gives it) has at `name`."""
    value = config
    for key in re.findall(r"\w+", name):
        value = value[int(key)] if key.isdigit() else getattr(value, key)
    require(good, name, value, allowed)


_KINDS = {int: "a whole number of at most 31 bits", float: "a number: 0, or 1e-37 to 3e38 in size"}
_KINDS |= {bool: "True or False", str: "a string without control characters", tuple: "a tuple"}
_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # Unicode: control, half a surrogate pair, ends of lines


def typed(name: str, value: Any, kind: Any) -> Any:
    """The value as `kind`: int, float, bool, str, tuple, or a tuple of one of these.

    An int passes for a float and a list for a tuple. Numbers must fit in int32 and float32.
    """
    try:
        return _convert(value, kind)
    except ValueError:
        allowed = _KINDS.get(kind) or f"a {kind}"
        raise ConfigError(f"{name} is {shown(value)}; it must be {allowed}") from None


def _convert(value: Any, kind: Any) -> Any:
    """Raises ValueError if the value is not of this kind."""
    entries = typing.get_args(kind)
    if isinstance(kind, types.UnionType):  # a number or a tuple
        kind = next(
            (k for k in entries if isinstance(value, (tuple, list)) == (k is not int)), kind
        )
        return _convert(value, kind)
    if kind is tuple or entries:
        size = len(entries) if entries and entries[-1] is not ... else None
        if not isinstance(value, (tuple, list)) or size not in (None, len(value)):
            raise ValueError
        return tuple(_convert(v, entries[0]) if entries else v for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= 3e38 else math.inf
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if good and kind is int:
        good = abs(value) < 2**31
    elif good and kind is float:
        good = value == 0 or 1e-37 <= abs(value) <= 3e38  # not NaN
    elif good and kind is str:
        good = not any(unicodedata.category(c) in _CONTROL for c in value)
    if not good:
        raise ValueError
    return value
