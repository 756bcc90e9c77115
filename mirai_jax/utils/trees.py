"""Nested dictionaries, such as configs and manifests: plain, and compared field by field."""

import json
from collections.abc import Mapping
from typing import Any


def shown(value: Any) -> str:
    """The repr of a value for an error message: in one line, cut where it is long."""
    try:
        text = " ".join(repr(value).splitlines())
    except Exception:  # an int of 5,000 digits has no repr
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def plain(tree: Any) -> Any:
    """The tree with its mappings (ConfigDicts inside tuples too) as dictionaries, its lists as tuples."""
    if hasattr(tree, "items"):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(plain(value) for value in tree)
    return tree


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """{'a.b': leaf, 'terms[0].c': leaf}; a tuple without dictionaries is a leaf."""
    if isinstance(tree, Mapping):
        inner = {f"{path}.{k}" if path else k: v for k, v in tree.items()}
    elif isinstance(tree, (tuple, list)) and any(isinstance(v, Mapping) for v in tree):
        inner = {f"{path}[{i}]": v for i, v in enumerate(tree)}
    else:
        return {path: tree}
    return {k: leaf for name, part in inner.items() for k, leaf in flat(part, name).items()}


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """{field: (old value, new value)} of two trees as JSON holds them; None is a missing field."""
    old, new = (flat(json.loads(json.dumps(plain(tree)))) for tree in (old, new))
    fields = sorted(old.keys() | new.keys())
    return {f: (old.get(f), new.get(f)) for f in fields if old.get(f) != new.get(f)}


def was_is(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """What `differences` gave, in one line: 'seed was 0, is 1; model.width was 96, is 128'."""
    return "; ".join(
        f"{' '.join(field.splitlines())} was {shown(old)}, is {shown(new)}"
        for field, (old, new) in changed.items()
    )
