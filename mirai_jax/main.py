"""Trains: `python -m mirai_jax.main --config=configs/mirai_e.py[:scale] [--config.field=value ...]`.

Exit status: 0 finished; 1 an error that is yours to mend; 75 told to stop (SIGTERM), all is saved and
the same command goes on; 76 another process died or hangs, start all of them again. With several
processes JAX's runtime may end one by itself (134).
"""

import contextlib
import pathlib
import sys

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from mirai_jax import sharding
from mirai_jax.benchmark import chips, memory_plan
from mirai_jax.config import schema
from mirai_jax.training import train
from mirai_jax.utils import cli, distributed
from mirai_jax.utils.errors import LESS_MEMORY, ConfigError, Lost, TrainingError, first_line

_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE[:scale] of configs/.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default: runs/<config>-<scale>. An unfinished run goes on."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    distributed.MODES,
    "Whether this is one of several processes of a run. auto: where SLURM, Open MPI or the next three "
    "flags say so; on: also on a Cloud TPU slice.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat", 100, "Seconds of silence after which another process counts as dead.", 1
)
_PLAN = flags.DEFINE_integer(
    "plan",
    0,
    "Train nothing: say how much memory each of so many (simulated) devices would need.",
    0,
)
_PLAN_FOR = flags.DEFINE_string(
    "plan_for",
    "",
    "With --plan: compile for this chip, which need not be here: h100, h200, a100 (by jax[cuda12]) or a "
    "TPU slice such as v5e:2x4 (by jax[tpu]).",
)


def _missing_field(argv: list[str]) -> str | None:
    """For a misspelt --config.field: what is allowed there instead."""
    pairs = []  # of --flag=value and --flag value
    for i, argument in enumerate(argv):
        if argument.startswith("-"):
            flag, given, value = argument.lstrip("-").partition("=")
            pairs.append((flag, value if given else "".join(argv[i + 1 : i + 2])))
    config = flags.FLAGS["config"].parser.parse(dict(pairs)["config"])
    for flag, value in pairs:
        if not flag.startswith("config."):
            continue
        node, walked = config, "config"
        # foresight[0].weights -> foresight, [0], weights
        for key in flag.removeprefix("config.").replace("[", ".[").split("."):
            if isinstance(node, tuple):
                allowed = [f"[{i}]" for i in range(len(node))]
            else:
                allowed = list(node.keys()) if hasattr(node, "keys") else []
            if key not in allowed:
                listed = ", ".join(allowed) or "none"
                return f"{flag} (given {value!r}) does not exist; the fields of {walked}: {listed}"
            walked += key if key.startswith("[") else f".{key}"
            node = node[int(key[1:-1])] if isinstance(node, tuple) else node[key]
    return None


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser with errors of one line and exit status 1."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None:
            raise ConfigError("--config is missing; it must be a file such as configs/mirai_e.py")
        _CONFIG.value.to_dict()  # a file that cannot be read shows itself here
        if len(rest) > 1:
            raise ConfigError(f"argument {rest[1]!r} is not understood; use --config.field=value")
        return rest
    except Exception as error:  # whatever a config file or its flags raise
        text = None
        if isinstance(error, (AttributeError, LookupError, TypeError, flags.Error)):
            with contextlib.suppress(Exception):  # the first error is the one to tell
                text = _missing_field(argv)
        if text is None:
            # ml_collections wraps a config file's own error in its traceback: its last line.
            text = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
            text = text.removeprefix("ValueError: ")
        sys.exit(f"error: {' '.join(text.splitlines())}")


def _print_plan(config: ml_collections.ConfigDict, count: int, chip: str) -> None:
    if chip:
        devices = chips.devices(chip, count)
    else:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
        devices = jax.devices()
    settings = schema.read(memory_plan.without_files(config), len(devices))
    mesh = dict(zip(sharding.AXES, settings.mesh, strict=True))
    print(
        f"memory of each of {count} x {devices[0].device_kind}, mesh {mesh}, batch {settings.batch_size} in "
        f"{settings.accumulate} part(s), model.remat {settings.generator.remat}; compiling"
    )
    try:
        found = memory_plan.plan(settings, devices)
    except jax.errors.JaxRuntimeError as error:  # compilers for TPUs refuse what does not fit
        raise TrainingError(
            f"the compiler refuses the step ({first_line(error)[:300]}); where it is for "
            f"memory, {LESS_MEMORY}"
        ) from error
    print(*found.lines(), sep="\n")
    if chip in chips.GPUS:
        print(chips.verdict(chip, found.total))
    elif not chip:
        print(
            "by XLA's compiler for CPUs; see mirai_jax/benchmark/memory_plan.py for how far that holds elsewhere"
        )


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    name, scale = config.get("name"), config.get("scale")  # one that is missing is told by train
    workdir = _WORKDIR.value or pathlib.Path("runs") / f"{name}-{scale}"
    interrupted = f"interrupted; the same command goes on from the last checkpoint of {workdir}"
    with cli.program(TrainingError, Lost, interrupted=interrupted):
        if _PLAN.value:
            _print_plan(config, _PLAN.value, _PLAN_FOR.value)
            return
        if _PLAN_FOR.value:
            raise ConfigError("--plan_for goes with --plan=N, the number of devices")
        distributed.start(
            _DISTRIBUTED.value,
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            heartbeat=_HEARTBEAT.value,
        )
        train.train(config, workdir)


if __name__ == "__main__":
    cli.run(main, flags_parser=parse_flags)
