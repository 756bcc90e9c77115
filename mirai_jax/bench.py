"""Speed and memory: `python -m mirai_jax.bench --config=configs/mirai_e.py:imagenet_b`.

    python -m mirai_jax.bench --config=configs/mirai_e.py:imagenet_b                # one variant
    python -m mirai_jax.bench --config=configs/mirai_e.py:imagenet_b --compare     # LlamaGen, E, I
    python -m mirai_jax.bench --config=... --compare --json=bench.json --figure=bench.png
    python -m mirai_jax.bench --config=... --compare \\
        --peer="python tests/official_peer.py --llamagen=FOLDER --mirai=FOLDER"    # PyTorch beside it

It prints the train step and its parts, images and tokens a second, operations and MFU, memory as
planned and as it was, compile time, the sampler and its share of the memory roof, and the input
pipeline alone. All that is timed takes turns, so that a slow minute of the machine slows all; what is
told is the median. Batches and frozen networks are random numbers of the right shapes: no data and no
weights are needed. Every field is set as in training: --config.batch_size=4 --config.model.dtype=float32.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import time
from typing import Any

import jax
from absl import flags

from mirai_jax.benchmark import measure, memory_plan, report
from mirai_jax.benchmark import work as work_lib
from mirai_jax.benchmark.measure import Peer, PeerError
from mirai_jax.config import schema
from mirai_jax.config.flags import parse_config
from mirai_jax.models.generator import SIZES, GeneratorConfig
from mirai_jax.utils import cli, files
from mirai_jax.utils.errors import ConfigError, first_line
from mirai_jax.utils.progress import Progress

_FLAGS = cli.flag_values(__name__)
_CONFIG = flags.DEFINE_string(
    "config", None, "FILE[:scale] of configs/; --config.field=value overrides.", flag_values=_FLAGS
)
_COMPARE = flags.DEFINE_bool(
    "compare",
    False,
    "Measure llamagen.py, mirai_e.py and mirai_i.py of the config's folder, and the config itself if it "
    "is another, and say their ratios.",
    flag_values=_FLAGS,
)
_MEASURE = flags.DEFINE_multi_enum(
    "measure",
    ["step", "parts", "sampler", "input"],
    ["compile", "step", "parts", "sampler", "input"],
    "What to measure, besides compiling the step; may be repeated. compile: no more than that.",
    flag_values=_FLAGS,
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds that are timed.", 1, flag_values=_FLAGS)
_SAMPLE_BATCH = flags.DEFINE_integer(
    "sample_batch", 0, "Images sampled at once; 0: 1 on a CPU, else 64.", 0, flag_values=_FLAGS
)
_PEER = flags.DEFINE_string(
    "peer", "", "A program that does the official code's steps, timed in turn.", flag_values=_FLAGS
)
_PEAK = flags.DEFINE_float(
    "peak_tflops",
    0.0,
    "Of all devices, for MFU; 0: the datasheet's, else what matrix products reach here.",
    0.0,
    flag_values=_FLAGS,
)
_JSON = flags.DEFINE_string("json", "", "File for all numbers.", flag_values=_FLAGS)
_FIGURE = flags.DEFINE_string("figure", "", "PNG file for a figure of them.", flag_values=_FLAGS)
_TRACE = flags.DEFINE_string(
    "trace", "", "Folder for a profiler's trace of one more step each.", flag_values=_FLAGS
)

COMPARED = ("llamagen", "mirai_e", "mirai_i")


def log(line: str) -> None:
    print(line, flush=True)


def read_settings(overrides: list[str]) -> dict[str, schema.Settings]:
    """The variants to measure, by name.

    Raises:
        ConfigError: one line.
    """
    if not _CONFIG.value:
        raise ConfigError("--config is missing; it must be a file such as configs/mirai_e.py")
    for argument in overrides:
        if not argument.startswith("--config.") or "=" not in argument:
            raise ConfigError(f"argument {argument!r} is not understood; use --config.field=value")
    path, _, scale = _CONFIG.value.partition(":")
    wanted = [path]
    if _COMPARE.value:
        compared = [str(pathlib.Path(path).with_name(f"{name}.py")) for name in COMPARED]
        wanted = list(dict.fromkeys([*compared, str(pathlib.Path(path))]))
    found: dict[str, schema.Settings] = {}
    for file in wanted:
        config = parse_config([f"--config={file}:{scale or 'demo'}", *overrides])
        settings = schema.read(memory_plan.without_files(config), len(jax.devices()))
        if settings.name in found:
            raise ConfigError(f"{file} is named {settings.name!r} too; its name must be its own")
        found[settings.name] = settings
    return found


def start_peer(settings: schema.Settings, sample_batch: int) -> Peer:
    """The peer, told what it shall do.

    Raises:
        ConfigError: it cannot do what is measured here.
    """
    config = settings.generator
    if len(jax.devices()) > 1 or jax.default_backend() not in ("cpu", "gpu"):
        raise ConfigError("--peer: the official code is measured on a CPU or on one GPU alone")
    _require_official(settings)
    shape = (config.num_layers, config.num_heads, config.width)
    size = next((name for name, known in SIZES.items() if known == shape), None)
    if size is None or config.grid[0] != config.grid[1]:
        raise ConfigError(f"--peer: the official code has no generator of {shape} on {config.grid}")
    tap = next((term.student_layer for term in settings.terms), schema.two_thirds(shape[0]))
    message = {
        "size": size,
        "tap": tap,
        "grid": config.grid[0],
        "vocab_size": config.vocab_size,
        "num_classes": config.num_classes,
        "batch_size": settings.batch_size,
        "dtype": config.dtype,
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
        "sample_batch": sample_batch,
        "guidance": settings.sample.guidance,
    }
    return Peer(_PEER.value, *(f"--{name}={value}" for name, value in message.items()))


def _require_official(settings: schema.Settings) -> None:
    """The peer's recipe is fixed: beside another one its numbers would mean nothing."""
    config, sample = settings.generator, settings.sample
    official = GeneratorConfig(config.num_layers, config.num_heads, config.width)
    same = all(
        getattr(config, name) == getattr(official, name)
        for name in ("token_dropout", "residual_dropout", "ffn_dropout", "class_dropout")
    )
    same &= (sample.temperature, sample.top_k, sample.top_p, sample.greedy) == (1, 0, 1, False)
    same &= settings.accumulate == 1
    for term in settings.terms:
        mine = (term.source, term.level, len(term.offsets), term.projector_width)
        same &= mine == ("ema", "internal", 3, 2048) and term.student_layer == term.teacher_layer
    if not same:
        raise ConfigError(
            "--peer: dropout, foresight terms, accumulate and sampling must be the official recipe's, "
            "which is all that it runs"
        )


def about(settings: schema.Settings) -> dict[str, Any]:
    """What was measured, where and by which command."""
    device, config = jax.devices()[0], settings.generator
    return {
        "command": shlex.join(["python", "-m", "mirai_jax.bench", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "scale": settings.scale,
        "generator": dataclasses.asdict(config),
        "batch_size": settings.batch_size,
        "guidance": settings.sample.guidance,
        "teacher_dtype": settings.teacher.dtype,
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "devices": len(jax.devices()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "mesh": settings.mesh,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")


def run(overrides: list[str]) -> dict[str, Any]:
    """Measures what the flags say, prints and returns it.

    Raises:
        ConfigError: one line.
    """
    chosen = set(_MEASURE.value) - {"compile"}
    if "parts" in chosen and "step" not in chosen:
        raise ConfigError("--measure=parts goes with --measure=step, whose state they use")
    for folder in (os.path.dirname(path) for path in (_JSON.value, _FIGURE.value) if path):
        if folder and not os.path.isdir(folder):
            raise ConfigError(f"there is no folder {folder!r} for --json or --figure")
    devices, found = jax.devices(), read_settings(overrides)
    first = next(iter(found.values()))
    if "parts" in chosen and (first.accumulate > 1 or first.data.online):
        raise ConfigError(
            "the parts of a step with accumulate or online codes are not measured: --measure=step"
        )
    sample_batch = _SAMPLE_BATCH.value or (1 if devices[0].platform == "cpu" else 64)
    peer = start_peer(found.get("mirai_e", first), sample_batch) if _PEER.value else None
    results: dict[str, Any] = {"about": about(first), "variants": {}}
    # What is kept compiled from before would not be measured.
    jax.config.update("jax_enable_compilation_cache", False)
    if chosen:
        log("roofs: matrix products and memory")
        results["roofs"] = roofs(first, devices, {})
    works = {}
    for name, settings in found.items() if set(_MEASURE.value) & {"compile", "step"} else ():
        log(f"{name}: compiling its step")
        works[name] = work = work_lib.Work(settings, devices)
        results["variants"][name] = work.facts()
        log("\n".join(["  planned, on each device:", *work.plan.lines()]))
        if "step" in chosen:
            log(f"{name}: first steps")
            results["variants"][name]["peak_bytes"] = work.begin()
    tasks = {}
    if "step" in chosen:
        tasks = {f"step {name}": work.step for name, work in works.items()}
    if "parts" in chosen:
        for name, work in works.items():
            log(f"{name}: compiling its parts")
            tasks |= {f"part {name} {part}": task for part, task in work.parts().items()}
    if "sampler" in chosen:
        log(f"sampler: compiling, {sample_batch} images at once")
        sampling = work_lib.Sampling(first, sample_batch)
        results["sampler"] = sampling.facts()
        tasks["sample"] = sampling.draw
    refused = {}
    if peer is not None:
        for name, task in peer_tasks(tasks):
            log(f"peer: first {task}")
            try:
                peer(task)
            except PeerError as error:
                refused[name] = str(error)
                log(f"  {error}")
            else:
                tasks[f"peer {name}"] = lambda task=task: peer(task)
    if tasks:
        progress = Progress(_REPEATS.value, "rounds")
        taken = measure.in_turn(tasks, _REPEATS.value, lambda _: progress.advance(1))
        progress.close()
        share_out(results, taken)
        results["peer_refused"] = refused
        if devices[0].platform == "cpu":
            # Once more: what else runs there may have slowed it for a while.
            results["roofs"] = roofs(first, devices, results["roofs"])
    if peer is not None:
        peer.close()
    if _TRACE.value and tasks:
        with jax.profiler.trace(_TRACE.value):
            for name, task in tasks.items():
                if not name.startswith("peer"):
                    task()
        log(f"trace: {_TRACE.value}")
    if "input" in chosen:
        log("input: reading batches without training")
        results["input"] = {"images_per_second": work_lib.input_rate(first)}
    return results


def roofs(
    settings: schema.Settings, devices: list[jax.Device], before: dict[str, float]
) -> dict[str, Any]:
    """The most that can be done: operations on all devices together, bytes on one, where the sampler
    runs. The best of now and `before`, or of now alone."""
    device, dtype, count = devices[0], settings.generator.dtype, len(devices)
    # Simulated devices of a CPU share what it has.
    ways = 1 if device.platform == "cpu" else count
    datasheet = measure.datasheet_rate(device, dtype)
    reached = max(measure.matmul_rate(dtype, device) * ways, before.get("matmul_flops", 0))
    memory = max(measure.memory_rate(device), before.get("memory_bytes", 0))
    if _PEAK.value:
        peak, by = _PEAK.value * 1e12, "as --peak_tflops says"
    elif datasheet:
        peak, by = datasheet * count, "by its datasheet"
    else:
        peak, by = reached, "reached by matrix products"
    return {"matmul_flops": reached, "peak_flops": peak, "peak_by": by, "memory_bytes": memory}


def peer_tasks(tasks: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, what the peer is asked) of what it can do beside `tasks`."""
    known = {"step llamagen": "train llamagen", "step mirai_e": "train mirai_e", "sample": "sample"}
    return [(name, task) for name, task in known.items() if name in tasks]


def share_out(results: dict[str, Any], taken: dict[str, list[float]]) -> None:
    """Puts the seconds of the tasks where they belong in the results."""
    for task, values in taken.items():
        kind, _, rest = task.partition(" ")
        if kind == "step":
            results["variants"][rest]["step_seconds"] = values
        elif kind == "part":
            name, _, part = rest.partition(" ")
            results["variants"][name].setdefault("part_seconds", {})[part] = values
        elif kind == "sample":
            results["sampler"]["seconds"] = values
        else:
            results.setdefault("peer_seconds", {})[rest] = values


def main(argv: list[str]) -> None:
    with cli.program(PeerError, interrupted="interrupted; nothing was written"):
        try:
            results = run(argv[1:])
        except jax.errors.JaxRuntimeError as error:
            raise ConfigError(f"the devices failed ({first_line(error)[:300]})") from error
        log("")
        log("\n".join(report.lines(results)))
        if _JSON.value:
            files.write_text(_JSON.value, json.dumps(results, indent=1) + "\n")
            log(f"written: {_JSON.value}")
        if _FIGURE.value:
            report.figure(results, pathlib.Path(_FIGURE.value))
            log(f"look at {_FIGURE.value}")


if __name__ == "__main__":
    cli.run(main, flags_parser=functools.partial(cli.parse_known, flags.FLAGS))
