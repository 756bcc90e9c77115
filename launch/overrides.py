"""What a sweep file is made of: override dictionaries, ways to combine them, and names for them.

An entry is a dictionary {field of the config: value}. Two keys are not fields: "config", the config
file of the run, and "name", what to call its setting where the values alone would not read well.
"""

import ast
import hashlib
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from mirai_jax.utils.errors import ConfigError

Entry = dict[str, Any]

_LONGEST = 100  # letters of a name
_TAKEN = ("jobs", "jobs.json", "lock", "table.md", "table.csv", "timing.csv", "curves.png")


def over(field: str, values: Iterable[Any]) -> list[Entry]:
    """One entry a value: over("seed", [0, 1]) is [{"seed": 0}, {"seed": 1}]."""
    return [{field: value} for value in values]


def product(*parts: Iterable[Entry]) -> list[Entry]:
    """Every entry of the first with every one of the second, and so on; the last changes fastest."""
    entries: list[Entry] = [{}]
    for part in map(list, parts):
        entries = [_joined("product", entry, more) for entry in entries for more in part]
    return entries


def zipped(*parts: Iterable[Entry]) -> list[Entry]:
    """The first entries of all together, then the second ones, and so on."""
    lists = [list(part) for part in parts]
    if len({len(part) for part in lists}) > 1:
        raise ConfigError(
            f"zipped: parts of {', '.join(str(len(part)) for part in lists)} entries; all must be "
            "of one length"
        )
    return [_joined("zipped", *entries) for entries in zip(*lists, strict=True)]


def chain(*parts: Iterable[Entry]) -> list[Entry]:
    """The entries of the first, then those of the second, and so on."""
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
    """Three at scales of minutes and hours; at ImageNet's one run a setting, as was published."""
    return over("seed", [0] if scale.startswith("imagenet") else [0, 1, 2])


def plain(value: Any) -> Any:
    """Lists inside as tuples: on the command line they are the same."""
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def flag_text(field: str, value: Any) -> str:
    """The text that the program's flag --config.field reads as exactly this value.

    Raises:
        ConfigError: there is none.
    """
    text = value if isinstance(value, str) else repr(plain(value))
    good = "\0" not in text
    if not isinstance(value, str):
        try:
            good = value is not None and ast.literal_eval(text) == plain(value)
        except (ValueError, SyntaxError):
            good = False
    if not good:
        raise ConfigError(
            f"{field} is {value!r} ({type(value).__name__}); it must be a plain string, number, "
            "True, False, or a tuple of such"
        )
    return text


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+-]", "-", text)


def _word(value: Any) -> str:
    """A value inside a name: ((0, 0), (0, 1)) is 0_0+0_1."""
    value = plain(value)
    if isinstance(value, tuple):
        nested = any(isinstance(v, tuple) for v in value)
        return ("+" if nested else "_").join(map(_word, value)) or "none"
    return _safe(str(value)) or "none"


def _config_word(config: str) -> str:
    path, _, scale = config.partition(":")
    return _safe(pathlib.PurePath(path).stem + (f"-{scale}" if scale else ""))


def _told(entries: list[Entry]) -> list[str]:
    """The fewest keys that tell all entries apart and leave none that sets something without a word:
    one that follows from those before it is left out. The seed comes last, so that what is left of a
    name without it is the setting.
    """
    keys = dict.fromkeys(
        ["name", "config", *(k for e in entries for k in e if k != "seed"), "seed"]
    )
    message: list[str] = []
    count = lambda keys: len({tuple(repr(e.get(k, ...)) for k in keys) for e in entries})  # noqa: E731
    for key in keys:
        alone = any(key in e and not any(k in e for k in message) for e in entries)
        if count([*message, key]) > count(message) or (alone and count([key]) > 1):
            message.append(key)
    return message


def columns(entries: list[Entry]) -> dict[str, str]:
    """{key: short title} of what differs between the entries."""
    message = _told(entries)
    last = [key.rpartition(".")[2] for key in message]
    return {
        key: short if last.count(short) == 1 else re.sub(r"[\[\]]", "", key)
        for key, short in zip(message, last, strict=True)
    }


def names(entries: list[Entry]) -> list[tuple[str, str]]:
    """(name, setting) of each entry, both made of what differs; the setting is without the seed.

    A name is safe as a folder and inside a list with commas. The same entries have the same names. A
    hash is added where one is too long or not unique.
    """
    titles = columns(entries)
    made = []
    for entry in entries:
        words = {}
        for key, title in titles.items():
            if key == "name" and key in entry:
                words[key] = _safe(str(entry[key]))
            elif key == "config" and key in entry:
                words[key] = _config_word(str(entry[key]))
            elif key in entry:
                words[key] = f"{_safe(title)}={_word(entry[key])}"
        setting = ", ".join(word for key, word in words.items() if key != "seed")
        name = "-".join(words.values()) or _config_word(str(entry.get("config", "run")))
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
