"""Runs on this machine's devices alone, which end with a network in a folder: tokenizers and encoders.

`mirai_jax.tokenize` and `mirai_jax.teach` have their data, their step and their measurements; this is
what they share.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mirai_jax import sharding
from mirai_jax.config import unused
from mirai_jax.config.fields import fill
from mirai_jax.config.flags import parse_config
from mirai_jax.data.pipeline import Batches
from mirai_jax.training import loop
from mirai_jax.training.checkpoint import Checkpoints
from mirai_jax.training.guards import HangGuard
from mirai_jax.training.start import restore_or_make, steps_done
from mirai_jax.training.workdir import claim
from mirai_jax.utils import cli, files, paths
from mirai_jax.utils.errors import TrainingError
from mirai_jax.utils.trees import plain
from mirai_jax.weights import pretrained

Log = Callable[[str], None]


def door(
    module: str, example: str, group: type, needs: Mapping[str, Any], train: Callable[..., None]
) -> tuple[Any, Callable, Callable[[list[str]], None]]:
    """A program that trains: its flags, their parser and its `main`.

    Args:
        module: its `__name__`; `example` is a config of it.
        group, needs: of the config, see `unused.notes`.
        train: takes the config and the workdir.
    """
    values, define = cli.flags_of(module)
    file = define.string(
        "config", "", f"FILE[:scale], such as {example}; --config.field=value overrides."
    )
    workdir = define.string(
        "workdir", None, "Folder of the run, resumed if it exists; default: runs/<config>-<scale>."
    )

    def main(argv: list[str]) -> None:
        with cli.program(TrainingError, interrupted="interrupted; the same command resumes"):
            config = parse_config([f"--config={file.value}", *argv[1:]])
            unused.report(config, argv[1:], group, needs)
            name = f"{config.get('name')}-{config.get('scale')}"  # `train` checks both
            train(config, workdir.value or pathlib.Path("runs") / name)

    return values, functools.partial(cli.parse_known, values), main


class Built(NamedTuple):
    """A task with its data.

    `identity` and `codebook` are those of `workdir.claim`, `lines` go to the log.
    """

    task: "LocalTask"
    identity: dict[str, str]
    codebook: Any
    lines: Sequence[str]


class LocalTask(loop.Task):
    """A state that each device holds whole, while a batch is divided among them.

    Args:
        config: typed; has the fields of LoopSettings and `seed`.
        made: the folder, in the workdir, of the network that the finished run makes.
    """

    def __init__(
        self,
        config: Any,
        batches: Batches,
        workdir: pathlib.Path,
        devices: list[jax.Device],
        made: str,
    ):
        self.batches, self._config = batches, config
        self.settings = fill(loop.LoopSettings, config)
        self._summary, self._made = workdir / "summary.png", workdir / made
        self._mesh = sharding.make_mesh((len(devices), 1, 1), devices)
        self._replicated = sharding.replicated(self._mesh)
        self._split = sharding.batch_sharding(self._mesh)

    def init(self, key: jax.Array) -> Any:
        """The state before step 0."""
        raise NotImplementedError

    def size(self, shapes: Any) -> str:
        """How many parameters a state has, for the log."""
        raise NotImplementedError

    def begin(self, checkpoints: Checkpoints, log: Log, warn: Log) -> tuple[Any, int]:
        # Of a shorter run: they mark what is finished.
        self._summary.unlink(missing_ok=True)
        files.remove_tree(self._made)
        make = lambda: self.init(jax.random.key(self._config.seed))
        shapes = jax.eval_shape(make)
        log(f"parameters: {self.size(shapes)}")
        placement = jax.tree.map(lambda _: self._replicated, shapes)
        return restore_or_make(make, placement, checkpoints, self._config.num_steps, log, warn)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return sharding.put_batch(batch, self._mesh)


def run(
    read: Callable[[Mapping[str, Any], int], Any],
    group: type,
    made: str,
    how_to_use: Callable[[pathlib.Path], str],
    build: Callable[[Any, pathlib.Path, list[jax.Device]], Built],
    config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    *,
    devices: list[jax.Device] | None = None,
    log: Log | None = None,
) -> None:
    """Trains, or continues, the network of `workdir` until it is finished.

    Args:
        read, group: of the config: what checks it, and its class.
        made: as of LocalTask; `how_to_use` is a line about it.
        build: takes the typed config, the workdir and the devices.
        config: a ConfigDict from configs/, or the like.
        workdir: created if need be; a run of another config in it is refused.
        devices: what to run on, each a part of the batch (default: all of this machine's).
        log: takes the lines for the screen (default: print).

    Raises:
        ConfigError, DataError, TrainingError, Preempted: one line each.
    """
    log = log or functools.partial(print, flush=True)
    devices = jax.local_devices() if devices is None else devices
    settings = read(config, len(devices))
    workdir, config = paths.at(workdir), plain(config)
    title, last = f"{settings.name}-{settings.scale}", settings.num_steps
    begin = steps_done(title, last, workdir, config, log, group)
    whole = (workdir / "summary.png").exists() and pretrained.is_converted(workdir / made)
    if begin == last and whole:
        log(f"this run is finished ({begin:,} steps); {how_to_use(workdir)}")
        return
    built = build(settings, workdir, devices)
    claimed = claim(workdir, config, built.identity, built.codebook, fresh=not begin)
    with claimed, contextlib.closing(HangGuard(0)) as guard:
        for line in (*built.lines, f"devices: {len(devices)} x {devices[0].device_kind}"):
            log(line)
        loop.Run(built.task, workdir, guard, log).run()
