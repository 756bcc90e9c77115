"""What the tests of arbitrary input share: reproducible examples, their count, and changes of nested trees."""

import collections
import copy
import functools
import json

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CASES = collections.Counter()  # of all tests of a file that ran


def fuzz(examples):
    """Hypothesis with the same examples every time."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


amounts = pytest.mark.parametrize(
    "amount", [1, pytest.param(24, marks=pytest.mark.slow)], ids=["some", "many"]
)


@pytest.fixture(scope="module", autouse=True)
def told_count(request):
    """Says how many cases really ran."""
    CASES.clear()
    yield
    each = ", ".join(f"{count:,} {what}" for what, count in CASES.items())
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nfuzzing: {sum(CASES.values()):,} cases ({each})")


def one_line(error, *parts):
    """The message, checked to be a line of bearable length that names what it should."""
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 9_000, message[:300]
    assert all(part in message for part in parts), (parts, message)
    return message


WORKDIR_FILES = [b"", b"{", b"[]", b"3", b'"x"', b"null", b"NaN", b"{}", b"\xff", b"\x00" * 99]
WORKDIR_FILES += [b"[" * 100_000, b'{"a": ' * 50_000, b"1" * 5000, b'{"foresight": [{"a": 1}, 2]}']
WORKDIR_FILES += [
    b'{"seed": ' + b"[" * depth + b"]" * depth + b"}" for depth in (99, 240, 480, 900)
]
WORKDIR_FILES += [
    b'{"a\\nb": 1, "\\ud800": {"": {"": 1}}}',
    b'{"model": {"a.b": 1, "a": {"b": 1}}}',
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged_json(draw, whole):
    """The bytes of a JSON file: cut off, flipped, of other values, or something else."""
    raw = json.dumps(whole).encode()
    kind = draw(st.sampled_from(["other", "cut", "flip", "replace", "replace"]))
    if kind == "other":
        return draw(st.one_of(st.sampled_from(WORKDIR_FILES), st.binary(max_size=30)))
    if kind == "cut":
        return raw[: draw(st.integers(0, len(raw) - 1))]
    if kind == "flip":
        return flipped(raw, draw(st.integers(0, len(raw) - 1)), draw(st.integers(0, 7)))
    tree = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        node, holder, key = tree, None, None
        while isinstance(node, (dict, list)) and node and (holder is None or draw(st.booleans())):
            keys = sorted(node) if isinstance(node, dict) else range(len(node))
            holder, key = node, draw(st.sampled_from(list(keys)))
            node = holder[key]
        if holder is not None:
            if isinstance(holder, dict) and draw(st.integers(0, 4)) == 0:
                del holder[key]
            else:
                holder[key] = draw(json_values)
    return json.dumps(tree).encode()


def flipped(raw, position, bit):
    return raw[:position] + bytes([raw[position] ^ 1 << bit]) + raw[position + 1 :]


def children(tree):
    return dict(enumerate(tree)) if isinstance(tree, tuple) else tree


def paths_of(tree, path=()):
    """The paths of all dictionaries, tuples and leaves; ('foresight', 0, 'offsets') is one."""
    inner = children(tree) if isinstance(tree, (dict, tuple)) else {}
    return [path] * bool(path) + [p for k in inner for p in paths_of(inner[k], (*path, k))]


def at(tree, path):
    return functools.reduce(lambda tree, key: children(tree)[key], path, tree)


def changed(tree, path, change):
    """A copy of the tree, with `change(dictionary, key)` applied where the path ends."""
    inner = dict(children(tree))
    if len(path) == 1:
        change(inner, path[0])
    else:
        inner[path[0]] = changed(inner.get(path[0], {}), path[1:], change)
    return tuple(inner.values()) if isinstance(tree, tuple) else inner


def replaced(tree, path, value):
    return changed(tree, path, lambda inner, key: inner.update({key: value}))


def missing(tree, path):
    return changed(tree, path, lambda inner, key: inner.pop(key))
