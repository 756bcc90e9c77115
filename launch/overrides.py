"""The parts of a sweep file: entries, ways to combine them, and names for them.

An entry is a dictionary {field of the config: value}. Two keys are not fields: "config", the config
file of the run, and "name", a name of the setting that reads better than its values.
"""

import hashlib
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from mirai_jax.utils.errors import ConfigError
from mirai_jax.utils.trees import plain

Entry = dict[str, Any]

_LONGEST = 100  # letters of a name
_TAKEN = ("jobs", "jobs.json", "lock", "table.md", "table.csv", "timing.csv", "curves.png")


def over(field: str, values: Iterable[Any]) -> list[Entry]:
    """Returns an entry for each value: over("seed", [0, 1]) is [{"seed": 0}, {"seed": 1}]."""
    return [{field: value} for value in values]


def product(*parts: Iterable[Entry]) -> list[Entry]:
    """Returns every combination of one entry from each part; the last part changes fastest."""
    entries: list[Entry] = [{}]
    for part in map(list, parts):
        entries = [_joined("product", entry, more) for entry in entries for more in part]
    return entries


def zipped(*parts: Iterable[Entry]) -> list[Entry]:
    """Returns the first entries of all parts joined, then the second ones, and so on."""
    lists = [list(part) for part in parts]
    if len({len(part) for part in lists}) > 1:
        raise ConfigError(f"zipped: parts of {[*map(len, lists)]} entries; all must match")
    return [_joined("zipped", *entries) for entries in zip(*lists, strict=True)]


def chain(*parts: Iterable[Entry]) -> list[Entry]:
    """Returns the entries of the first part, then those of the second, and so on."""
    return [entry for part in parts for entry in part]


def _joined(how: str, *entries: Entry) -> Entry:
    joined: Entry = {}
    for entry in entries:
        for field in entry:
            if field in joined:
                raise ConfigError(f"{how}: {field} is in more than one part")
        joined |= entry
    return joined


def seeds(scale: str) -> list[Entry]:
    """Three seeds at small scales; one at ImageNet's, as published."""
    return over("seed", [0] if scale.startswith("imagenet") else [0, 1, 2])


def flag_text(value: Any) -> str:
    """The text that a flag --config.FIELD reads as this value, if it is one that a flag can carry."""
    return value if isinstance(value, str) else repr(plain(value))


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+-]", "-", text)


def _word(value: Any) -> str:
    """A value inside a name: ((0, 0), (0, 1)) is 0_0+0_1."""
    value = plain(value)
    if isinstance(value, tuple):
        nested = any(isinstance(v, tuple) for v in value)
        return ("+" if nested else "_").join(map(_word, value)) or "none"
    return _safe(str(value)) or "none"


def _config_word(config: Any) -> str:
    path, _, scale = str(config).partition(":")
    return _safe(pathlib.PurePath(path).stem + (f"-{scale}" if scale else ""))


def _distinctive(entries: list[Entry]) -> list[str]:
    """The fewest keys that distinguish all entries and hide nothing that only some of them set.

    A key that follows from those before it is left out. The seed comes last, so that a name without it
    is the setting.
    """

    def count(keys: list[str]) -> int:
        return len({tuple(repr(entry.get(key, ...)) for key in keys) for entry in entries})

    fields = [key for entry in entries for key in entry if key != "seed"]
    chosen: list[str] = []
    for key in dict.fromkeys(["name", "config", *fields, "seed"]):
        alone = any(key in e and not any(k in e for k in chosen) for e in entries)
        if count([*chosen, key]) > count(chosen) or (alone and count([key]) > 1):
            chosen.append(key)
    return chosen


def columns(entries: list[Entry]) -> dict[str, str]:
    """{key: short title} of what differs between the entries."""
    keys = _distinctive(entries)
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: short if last.count(short) == 1 else re.sub(r"[\[\]]", "", key)
        for key, short in zip(keys, last, strict=True)
    }


def names(entries: list[Entry]) -> list[tuple[str, str]]:
    """(name, setting) of each entry, both made of what differs; the setting leaves out the seed.

    A name is safe as a folder and inside a list with commas. The same entries have the same names. A
    name that is too long or not unique ends with a hash.
    """
    titles = columns(entries)
    made = []
    for entry in entries:
        words = {}
        for key, title in titles.items():
            if key in ("name", "config") and key in entry:
                words[key] = _config_word(entry[key]) if key == "config" else _safe(str(entry[key]))
            elif key in entry:
                words[key] = f"{_safe(title)}={_word(entry[key])}"
        setting = ", ".join(word for key, word in words.items() if key != "seed")
        name = "-".join(words.values()) or _config_word(entry.get("config", "run"))
        made.append((name, setting, _digest(entry), _digest({**entry, "seed": None})))
    found = []
    for name, setting, digest, of_setting in made:
        twins = [m for m in made if m[0] == name]
        bad = len(twins) > 1 or len(name) > _LONGEST or name in _TAKEN
        if bad or name.startswith((".", "-")) or name.endswith(".log"):
            name = f"{name[:_LONGEST].strip('.-') or 'run'}-{digest}"
        if len({m[3] for m in made if m[1] == setting}) > 1:
            setting = f"{setting}, {of_setting}"
        found.append((name, setting))
    return found


def _digest(entry: Entry) -> str:
    items = sorted((key, repr(plain(value))) for key, value in entry.items())
    return hashlib.sha256(repr(items).encode()).hexdigest()[:8]
