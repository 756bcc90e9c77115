"""One benchmark from options to numbers: compile, warm up, time all tasks interleaved, collect.

The numbers are a dictionary that JSON can hold, the same as in the file of `bench --json`.
"""

import dataclasses
import importlib.metadata
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

import jax

from mirai_jax import sharding
from mirai_jax.benchmark import measure, memory_plan, rates, reference, work
from mirai_jax.config import schema
from mirai_jax.config.flags import parse_config
from mirai_jax.models.teacher import precision
from mirai_jax.training import follow
from mirai_jax.utils.errors import ConfigError
from mirai_jax.utils.progress import Progress

COMPARED = ("llamagen", "mirai_e", "mirai_i")
MEASURES = ("compile", "step", "parts", "sampler", "input")


def run(
    config: str,
    overrides: list[str],
    *,
    compare: bool = False,
    vary: str = "",
    measures: Collection[str] = MEASURES,
    repeats: int = 5,
    sample_batch: int = 0,
    reference_command: str = "",
    peak_tflops: float = 0.0,
    trace: str = "",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures and returns the numbers.

    Args:
        measures: of MEASURES; 'compile' is part of 'step'.
        sample_batch: images sampled at once; 0: 1 on a CPU, else 64.
        peak_tflops: of all devices, for MFU; 0: the datasheet's, else what matrix products reach.

    Raises:
        ConfigError: wrong options or settings; one line.
    """
    chosen, devices = set(measures), jax.devices()
    if "parts" in chosen and "step" not in chosen:
        raise ConfigError("--measure=parts goes with --measure=step, whose state they use")
    variants = read_settings(config, compare, overrides, vary)
    first = next(iter(variants.values()))
    if "parts" in chosen and (first.accumulate > 1 or first.data.online):
        raise ConfigError("--measure=parts goes without accumulate and online codes")
    sample_batch = sample_batch or (1 if devices[0].platform == "cpu" else 64)
    program = None
    if reference_command:
        official = variants.get("mirai_e", first)
        program = reference.start(reference_command, official, sample_batch)
    results: dict[str, Any] = {"about": about(first), "variants": {}}
    # A step out of the cache would compile in no time.
    jax.config.update("jax_enable_compilation_cache", False)
    if chosen - {"compile"}:
        log("rooflines: matrix products and memory")
        results["roofs"] = rooflines(first, devices, peak_tflops)

    # What is timed, by its place in the results.
    tasks: dict[tuple[str, ...], Callable[[], float]] = {}
    steps = {}
    for name, settings in variants.items() if chosen & {"compile", "step"} else ():
        log(f"{name}: compiling its step")
        steps[name] = step = work.StepWork(settings, devices)
        results["variants"][name] = step.facts()
        log("\n".join(["  planned, on each device:", *step.plan.lines()]))
        if "step" in chosen:
            log(f"{name}: first steps")
            results["variants"][name]["peak_bytes"] = step.first_steps()
            tasks["variants", name, "step_seconds"] = step.step
    for name, step in steps.items() if "parts" in chosen else ():
        log(f"{name}: compiling its parts")
        for part, task in step.parts().items():
            tasks["variants", name, "part_seconds", part] = task
    if "sampler" in chosen:
        log(f"sampler: compiling, {sample_batch} images at once")
        sampler = work.SamplerWork(first, sample_batch)
        results["sampler"] = sampler.facts()
        tasks["sampler", "seconds"] = sampler.draw
    ours = dict(tasks)
    if program is not None:
        results["peer_refused"] = {}
        for name, (task, place) in reference.TASKS.items():
            if place not in ours:
                continue
            log(f"official code: first {task}")
            try:
                program(task)
            except reference.ReferenceFailed as error:
                results["peer_refused"][name] = str(error)
                log(f"  {error}")
            else:
                tasks["peer_seconds", name] = lambda task=task: program(task)

    progress = Progress(repeats, "rounds", stream=sys.stderr if tasks else None)
    taken = measure.interleaved(tasks, repeats, lambda: progress.advance(1))
    progress.close()
    for place, values in taken.items():
        _put(results, place, values)
    if program is not None:
        program.close()
    if tasks and devices[0].platform == "cpu":
        # Once more: other programs may have slowed the first measurement.
        before = results["roofs"]
        results["roofs"] = rooflines(first, devices, peak_tflops, before)
    for name, step in steps.items() if "roofs" in results else ():
        roofs = results["roofs"]
        found = step.predicted(roofs["matmul_flops"], roofs["memory_bytes"])
        if found:
            results["variants"][name]["predicted_seconds"] = found
    if trace and ours:
        with jax.profiler.trace(trace):
            for task in ours.values():
                task()
        log(f"trace: {trace}")
    if "input" in chosen:
        log("input: reading batches without training")
        results["input"] = {"images_per_second": work.input_rate(first)}
    return results


def _put(results: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    *outer, last = place
    for key in outer:
        results = results.setdefault(key, {})
    results[last] = value


def read_settings(
    config: str, compare: bool, overrides: list[str], vary: str = ""
) -> dict[str, schema.Settings]:
    """The settings of the variants to measure, by name.

    Args:
        vary: 'field=A,B': the config with each value, named by it; `compare` adds LlamaGen alone.

    Raises:
        ConfigError: one line.
    """
    if not config:
        raise ConfigError("--config is missing; it must be a file such as configs/mirai_e.py")
    path, _, scale = config.partition(":")
    compared = COMPARED[: 1 if vary else None] if compare else ()
    files = [str(pathlib.Path(path).with_name(f"{name}.py")) for name in compared]
    field, _, values = vary.partition("=")
    changes = [(value, f"--config.{field}={value}") for value in values.split(",") if value]
    runs = [(file, "", overrides) for file in files]
    runs += [(str(pathlib.Path(path)), name, [*overrides, flag]) for name, flag in changes]
    if not changes and str(pathlib.Path(path)) not in files:
        runs.append((str(pathlib.Path(path)), "", overrides))
    found: dict[str, schema.Settings] = {}
    for file, name, flags in runs:
        fields = parse_config([f"--config={file}:{scale or 'demo'}", *flags])
        fields = follow.resolve(fields, lambda line: None)
        devices = jax.devices()
        slices = sharding.num_slices(devices)
        settings = schema.read(memory_plan.without_files(fields), len(devices), slices)
        name = name or settings.name
        if name in found:
            raise ConfigError(f"{file}: name is {name!r}, as another variant's")
        found[name] = settings
    return found


def rooflines(
    settings: schema.Settings,
    devices: list[jax.Device],
    peak_tflops: float = 0.0,
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What the machine can do at most: operations a second of all devices together, and bytes a second
    of one, where the sampler runs. The better of this measurement and the one `before`."""
    device, dtype, before = devices[0], settings.generator.dtype, before or {}
    # Simulated devices of a CPU share what it has.
    ways = 1 if device.platform == "cpu" else len(devices)
    chip = rates.of_kind(device.device_kind)
    reached = max(measure.matmul_rate(dtype, device) * ways, before.get("matmul_flops", 0))
    memory = max(measure.memory_rate(device), before.get("memory_bytes", 0))
    if peak_tflops:
        peak, by = peak_tflops * 1e12, "given by --peak_tflops"
    elif chip and dtype == "bfloat16":
        peak, by = chip.tflops[dtype] * 1e12 * len(devices), "by its datasheet"
    else:
        peak, by = reached, "reached by matrix products"
    return {"matmul_flops": reached, "peak_flops": peak, "peak_by": by, "memory_bytes": memory}


def about(settings: schema.Settings) -> dict[str, Any]:
    """What was measured, where, and by which command."""
    device = jax.devices()[0]
    return {
        "command": shlex.join(["python", "-m", "mirai_jax.bench", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "scale": settings.scale,
        "generator": dataclasses.asdict(settings.generator),
        "batch_size": settings.batch_size,
        "guidance": settings.sample.guidance,
        "teacher_dtype": precision(settings.teacher.dtype, device.platform),
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "devices": len(jax.devices()),
        "cores": measure.cpu_count(),
        "mesh": settings.mesh,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
