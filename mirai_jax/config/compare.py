"""Two configs of one run: what differs, and what may."""

import json
import re
from collections.abc import Mapping
from typing import Any

from mirai_jax.config.fields import plain, shown
from mirai_jax.utils.errors import ConfigError

# Fields that may differ between a workdir's config and the one it is continued with: they do not
# change what is computed, or, for num_steps, only how far (see `check_same_run`). Files may move:
# what the paths lead to is checked by parts.json.
RESUMABLE = (
    "num_steps",
    "log_every",
    "sample_every",
    "evaluate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "accumulate",  # but for the draws of dropout
    "nonfinite",
    "hang_limit",
    "judged_samples",
    "data.num_workers",
    "data.path",
    "data.images",
    "tokenizer.path",
    "teacher.path",
    "foresight[].checkpoint",
    "model.unroll",
    "model.remat",
    "model.attention",  # but for rounding
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "sample.guidance",
    "sample.interval",
    "sample.temperature",
    "sample.top_k",
    "sample.top_p",
    "sample.greedy",
    "sample.classes",
    "sample.per_class",
)


def may_change(field: str) -> bool:
    """Whether a run may go on with another value of the field; 'foresight[0].name' is one."""
    return re.sub(r"\[\d+]", "[]", field) in RESUMABLE


def to_json(config: Mapping[str, Any]) -> str:
    """The text of a workdir's config.json."""
    return json.dumps(plain(config), indent=2) + "\n"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """{'a.b': leaf}; terms are opened, other tuples are leaves."""
    if isinstance(value, Mapping):
        parts = {f"{path}.{k}" if path else k: v for k, v in value.items()}
    elif isinstance(value, (tuple, list)) and any(isinstance(v, Mapping) for v in value):
        parts = {f"{path}[{i}]": v for i, v in enumerate(value)}
    else:
        return {path: value}
    return {k: leaf for name, part in parts.items() for k, leaf in _flat(part, name).items()}


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """{field: (old value, new value)} of two configs; None stands for a missing field."""
    old, new = (_flat(json.loads(to_json(c))) for c in (old, new))
    fields = sorted(old.keys() | new.keys())
    return {f: (old.get(f), new.get(f)) for f in fields if old.get(f) != new.get(f)}


def check_same_run(old: Any, new: Any, workdir: str) -> dict[str, tuple[Any, Any]]:
    """Refuses to continue a workdir under a config that computes something else.

    Returns:
        The differing fields that are allowed to (RESUMABLE).

    Raises:
        ConfigError: names every field that is not.
    """
    changed = differences(old, new)
    refused = [f for f in changed if not may_change(f)]
    if "num_steps" in changed and new["optimizer"]["schedule"] != "constant":
        refused.append("num_steps")  # the learning rate depends on it
    if refused:
        listed = "; ".join(
            f"{' '.join(f.splitlines())} was {shown(changed[f][0])}, is {shown(changed[f][1])}"
            for f in refused
        )
        raise ConfigError(
            f"workdir {workdir} holds a run of another config: {listed}; "
            "use the same values, or another --workdir"
        )
    return changed
