"""From a sweep file to runs: names them, parses them as the training program does and checks them."""

import dataclasses
import json
import math
import pathlib
import runpy
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from ml_collections.config_flags import config_path

from launch.overrides import Entry, columns, flag_text, names
from mirai_jax.config import compare, fields, schema
from mirai_jax.config.flags import parse_config
from mirai_jax.training import follow, workdir
from mirai_jax.utils.errors import ConfigError, first_line
from mirai_jax.utils.trees import plain


class WrongRuns(Exception):
    """Runs that cannot start: a line for each."""

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        setting: the name without the seed.
        shown: {title of a column: value} of what differs between the runs.
    """

    name: str
    setting: str
    shown: Mapping[str, str]
    arguments: tuple[str, ...]
    workdir: pathlib.Path
    num_steps: int

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "mirai_jax.main", *self.arguments]

    @property
    def log(self) -> pathlib.Path:
        """The file with what the program prints."""
        return self.workdir.with_name(f"{self.name}.log")

    def step(self) -> int:
        """The last logged step."""
        return last_step(self.workdir / "metrics.jsonl")

    def finished(self) -> bool:
        """Whether all steps are done and summary.png, which the program writes last, is there."""
        return (self.workdir / "summary.png").exists() and self.step() == self.num_steps


def tail(path: pathlib.Path) -> list[bytes]:
    """The lines, with their ends, in the last 20,000 bytes of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        return file.read().splitlines(keepends=True)


def last_step(path: pathlib.Path) -> int:
    """The step in the last whole line of a metrics.jsonl; 0 without one."""
    try:
        whole = [line for line in tail(path) if line.endswith(b"\n")]
        return int(json.loads(whole[-1])["step"])
    except (OSError, IndexError, ValueError, KeyError, TypeError):
        return 0


def read_sweep(path: str, scale: str) -> list[Entry]:
    """Returns the entries of a sweep file, each with its config.

    Raises:
        ConfigError: the file cannot be read, or yields no entries.
    """
    try:
        found = runpy.run_path(path)
        if "get_sweep" not in found:
            raise ConfigError("it has no function get_sweep(scale)")
        entries = [dict(entry) for entry in found["get_sweep"](scale)]
        if not all(isinstance(field, str) for entry in entries for field in entry):
            raise ConfigError("get_sweep must yield dictionaries {field: value}")
    except Exception as error:  # whatever the file raises
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == path), None)
        where = path if line is None else f"{path}, line {line}"
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(f"{where}: {kind}{first_line(error)}") from error
    if not entries:
        raise ConfigError(f"{path}: get_sweep({scale!r}) yields no runs")
    default = {"config": found["CONFIG"]} if "CONFIG" in found else {}
    return [default | entry for entry in entries]


def _exact(value: Any, parsed: Any) -> bool:
    if isinstance(parsed, float) and type(value) is int:
        return parsed == value
    return repr(plain(value)) == repr(plain(parsed))


def _config_flags(entry: Entry, common: Mapping[str, str], scale: str) -> list[str]:
    if not isinstance(entry.get("config"), str):
        raise ConfigError('there is no config: neither CONFIG of the file nor "config" of the run')
    config = entry["config"] if ":" in entry["config"] else f"{entry['config']}:{scale}"
    values = dict(common)
    for field, value in entry.items():
        if field in ("name", "config"):
            continue
        if field in common:
            raise ConfigError(f"--set={field}={common[field]}: the sweep sets {field} too")
        values[field] = flag_text(value)
    overrides = [f"--config.{field}={text}" for field, text in values.items()]
    return [f"--config={config}", *overrides]


def _check(entry: Entry, arguments: list[str], folder: pathlib.Path) -> Mapping[str, Any]:
    """Returns the whole config of a run, once it is checked."""
    config = parse_config(arguments)
    settled = follow.resolve(config, lambda line: None)
    for field, value in entry.items():
        if field not in ("name", "config"):
            parsed = config_path.get_value(field, config)
            if not _exact(value, parsed):
                raise ConfigError(f"{field} is {value!r}, which the program reads as {parsed!r}")
    given = fields.read(schema.RunConfig, config)
    # Only the program itself knows whether it has more devices than the mesh needs.
    devices = math.prod(size for size in vars(given.mesh).values() if size > 0)
    schema.read(settled, num_devices=devices)
    if (given.data.name, given.data.codes, given.data.path) == ("images", "stored", ""):
        raise ConfigError("data.path is ''; it must be a folder of codes: --set=data.path=FOLDER")
    workdir.check_workdir(folder, settled)
    return settled


def make_runs(
    entries: list[Entry], scale: str, common: Mapping[str, str], out: pathlib.Path
) -> list[SweepRun]:
    """Returns the checked runs of a sweep.

    Args:
        scale: of every config that names none.
        common: {field: text} of all runs.

    Raises:
        WrongRuns: every run that cannot start, with the reason.
    """
    titles = columns(entries)
    runs, wrong, seen = [], [], {}
    for entry, (name, setting) in zip(entries, names(entries), strict=True):
        try:
            arguments = _config_flags(entry, common, scale)
            config = _check(entry, arguments, out / name)
            twin = seen.setdefault(compare.to_json(config), name)
            if name in (run.name for run in runs):
                raise ConfigError("the sweep yields it twice")
            if twin != name:
                raise ConfigError(f"it is the same run as {twin}")
        except ConfigError as error:
            wrong.append(f"{name}: {first_line(error)}")
            continue
        shown = {title: _shown(entry, config, key) for key, title in titles.items()}
        command = (arguments[0], f"--workdir={out / name}", *arguments[1:])
        runs.append(SweepRun(name, setting, shown, command, out / name, config["num_steps"]))
    if wrong:
        raise WrongRuns(wrong)
    return runs


def _shown(entry: Entry, config: Mapping[str, Any], key: str) -> str:
    """A run's value of a field, or its config's where the run does not set it."""
    if key == "config":
        path, colon, scale = entry[key].partition(":")
        return pathlib.PurePath(path).stem + colon + scale
    try:
        return str(plain(entry[key] if key in entry else config_path.get_value(key, config)))
    except (LookupError, AttributeError, TypeError, ValueError):
        return ""  # such as a field of foresight[0] where there is no foresight
