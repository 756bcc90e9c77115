"""Plans a run: `python -m mirai_jax.plan --config=configs/mirai_e.py:imagenet_3b --devices=16`.

Compiles the train step for 16 simulated devices, or with --chip for chips that need not be here, and
prints the memory that each device needs and how long a step is predicted to take (--chip, or one
device of this CPU); with --sampler also sampling. Trains nothing, and reads neither data nor
published weights.
Exit status: 0 planned; 1 an error to mend.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax

from mirai_jax import sharding
from mirai_jax.benchmark import chips, flops, memory_plan, predict, predict_sampler, rates
from mirai_jax.config import schema
from mirai_jax.config.flags import parse_config
from mirai_jax.training import follow
from mirai_jax.utils import cli
from mirai_jax.utils.errors import LESS_MEMORY, ConfigError, TrainingError, first_line

_FLAGS, _define = cli.flags_of(__name__)
_CONFIG = _define.string("config", "", "FILE[:scale] of configs/; --config.field=value overrides.")
_DEVICES = _define.integer(
    "devices", None, "Number of devices; default: all of the TPU slices, else 1.", 1
)
_CHIP = _define.string(
    "chip",
    "",
    "Compile for this chip: h100, h200, a100 (with jax[cuda12]) or a TPU slice such as v5e:2x4 (with "
    "jax[tpu]); '': for simulated devices of this CPU.",
)
_SLICES = _define.integer("slices", 1, "How many of the TPU slices of --chip.", 1)
_SAMPLER = _define.integer(
    "sampler", 0, "Predict sampling on one device too, this many images at once; 0: do not.", 0
)

parse_flags = functools.partial(cli.parse_known, _FLAGS)


def main(argv: list[str]) -> None:
    with cli.program(TrainingError):
        config = parse_config([f"--config={_CONFIG.value}", *argv[1:]])
        if _SLICES.value > 1 and ":" not in _CHIP.value:
            raise ConfigError(
                f"--slices is {_SLICES.value}; it must be 1 unless --chip is a TPU slice"
            )
        if _CHIP.value:
            devices = chips.devices(_CHIP.value, _DEVICES.value, _SLICES.value)
        else:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", _DEVICES.value or 1)
            devices = jax.devices()
        config = follow.resolve(config, print)
        slices = sharding.num_slices(devices)
        settings = schema.read(memory_plan.without_files(config), len(devices), slices)
        chip = _chip(devices)
        if _SAMPLER.value and chip is None:
            known = (name for name, of in rates.CHIPS.items() if name in chips.GPUS or of.clock)
            raise ConfigError(
                f"--sampler is {_SAMPLER.value}; it needs --chip of {', '.join(known)}, or --devices=1 "
                "without --chip"
            )
        mesh = dict(zip(sharding.AXES, settings.mesh, strict=True))
        print(
            f"memory of each of {len(devices)} x {devices[0].device_kind}"
            + f" in {slices} slices" * (slices > 1)
            + f", mesh {mesh}, batch {settings.batch_size} in {settings.accumulate} part(s), "
            f"model.remat {settings.generator.remat}; compiling"
        )
        with _compiling("step"):
            compiled = memory_plan.compile_step(settings, devices)
        plan = compiled.plan
        print(*plan.lines(), sep="\n")
        if _CHIP.value in chips.GPUS:
            print(chips.verdict(_CHIP.value, plan.total))
        elif not _CHIP.value:
            print("by XLA's compiler for CPUs; benchmark/memory_plan.py says how far it holds")
        if chip and chip.memory:
            print(f"of {chip.memory} GiB: it fits, for the compiler refuses what does not")
        if why := predict.obstacle(chip, devices):
            print(f"the time of a step is not predicted: {why}")
        else:
            operations = flops.step_flops(compiled.recipe, settings.batch_size).total
            prediction = predict.predict(compiled.run.as_text(), chip, len(devices))
            work = operations / len(devices), settings.batch_size, settings.num_steps
            print(*prediction.lines(chip, *work), sep="\n")
        if chip and _SAMPLER.value:
            with _compiling("sampler"):
                text = predict_sampler.compile_sampler(settings, _SAMPLER.value, devices[0])
            print(*predict_sampler.lines(text, chip, settings, _SAMPLER.value), sep="\n")


@contextlib.contextmanager
def _compiling(what: str) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:  # compilers for TPUs refuse what does not fit
        raise TrainingError(
            f"the compiler refuses the {what} ({first_line(error)[:300]}); if memory is the reason, "
            f"{LESS_MEMORY}"
        ) from error


def _chip(devices: list[jax.Device]) -> rates.Chip | None:
    """What to predict for; None: several simulated devices, or a chip whose rates are not known."""
    if _CHIP.value:
        return rates.CHIPS.get(_CHIP.value.split(":")[0])
    return predict.measured(devices[0]) if len(devices) == 1 else None


if __name__ == "__main__":
    cli.run(main, flags_parser=parse_flags)
