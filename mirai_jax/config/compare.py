"""Two configs of one run: what differs, and what may differ."""

import json
import re
from collections.abc import Mapping
from typing import Any

from mirai_jax.config.fields import complete, resumable
from mirai_jax.config.schema import RunConfig
from mirai_jax.utils.errors import ConfigError
from mirai_jax.utils.trees import differences, plain, was_is


def to_json(config: Mapping[str, Any]) -> str:
    """The text of a workdir's config.json."""
    return json.dumps(plain(config), indent=2) + "\n"


def check_same_run(
    old: Any, new: Any, workdir: str, group: type = RunConfig
) -> dict[str, tuple[Any, Any]]:
    """Refuses to resume a workdir with a config that computes something else.

    Args:
        old: the config of the workdir. A field that it lacks has its default, as in `new`.

    Returns:
        {field: (old value, new value)} of the fields that differ; all of them are resumable.

    Raises:
        ConfigError: names every differing field that is not.
    """
    changed = differences(complete(group, old), complete(group, new))
    allowed = set(resumable(group))
    if _depends_on_length(complete(group, new)):
        allowed.remove("num_steps")
    refused = {f: values for f, values in changed.items() if _pattern(f) not in allowed}
    if refused:
        raise ConfigError(
            f"workdir {workdir} holds a run of another config: {was_is(refused)}; "
            "use the same values, or another --workdir"
        )
    return changed


def _depends_on_length(config: Mapping[str, Any]) -> bool:
    """Whether the learning rate or the weight of a term at some step depends on the run's length."""
    terms = config.get("foresight", ())
    shares = any(term["schedule_unit"] == "shares" and term["schedule"] for term in terms)
    return config["optimizer"]["schedule"] != "constant" or shares


def _pattern(field: str) -> str:
    """'foresight[].name' of foresight[0].name."""
    return re.sub(r"\[\d+]", "[]", field)
