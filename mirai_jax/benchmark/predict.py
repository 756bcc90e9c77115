"""How long a chip takes for a compiled program: a prediction, for chips that are not here.

The lower end of the range is what arithmetic and main memory alone allow: the larger of an operation's
products at the peak rate and of its bytes outside the fast memory at full bandwidth.

The upper end exists for TPUs, whose compiler writes into its program how many cycles each operation will take
by its model of the chip. The model takes every operand from main memory, and in the end many lie in the
fast memory. Collectives have no cycles: they are counted by bytes on both links of a ring, those begun
early in the upper end alone.

For GPUs there is the lower end only. On a CPU the two rates are measured first (`measured`).

Left out: waits between operations, the input pipeline, checkpoints and measurements. Nothing here was
compared with an accelerator; docs/performance.md compares it with the clock on a CPU.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Sequence

import jax

from mirai_jax import sharding
from mirai_jax.benchmark import hlo, measure
from mirai_jax.benchmark.rates import BY_ROOFLINE, Chip

CLASSES = ("products", "attention", "optimizer", "collectives", "rest")


def obstacle(chip: Chip | None, devices: Sequence[jax.Device]) -> str:
    """Why a step on these devices, of this chip, has no prediction; '' where it has one."""
    kind = devices[0].device_kind
    if len(devices) > 1 and devices[0].platform == "cpu":
        return "one CPU simulates these devices"
    if sharding.num_slices(devices) > 1:
        return "the links between slices are not known"
    if chip is None:
        return f"the rates of a {kind} are not known"
    if len(devices) > 1 and not chip.link:
        return f"the links of a {kind} are not known"
    return ""


def measured(device: jax.Device, clock: Callable[[], float] = time.perf_counter) -> Chip:
    """This machine's CPU: float32 products and reading of memory, measured in some seconds.

    Args:
        clock: with `time.process_time` predictions are in processor time, of all cores together.
    """
    products = measure.matmul_rate("float32", device, clock)
    return of_rates(products, measure.memory_rate(device, clock))


def of_rates(products: float, memory: float) -> Chip:
    """What reaches `products` operations and `memory` bytes a second."""
    rates = dict.fromkeys(("bfloat16", "default", "high", "highest"), products / 1e12)
    basis = f"at the rates of this moment: {products / 1e9:,.0f} GFLOP/s, {memory / 1e9:,.1f} GB/s"
    return Chip(rates, memory / 1e9, basis=basis)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Milliseconds by class of work: the lower and the upper end.

    Attributes:
        traffic: milliseconds of all bytes through main memory, those of copies next to other work too:
            no program takes less.
    """

    classes: dict[str, tuple[float, float]]
    traffic: float = 0.0

    @property
    def total(self) -> tuple[float, float]:
        low, high = zip(*self.classes.values(), strict=True)
        return max(sum(low), self.traffic), max(sum(high), self.traffic)

    def lines(self, chip: Chip, flops: float, batch_size: int, steps: int) -> list[str]:
        """A table of a train step for the screen; `flops` by formula, of one chip's share of it."""
        rows = {**self.classes, "in all": self.total}
        low, high = self.total
        mfu = [flops / (1e9 * chip.tflops["bfloat16"] * ms) for ms in (high, low)]
        images = [1e3 * batch_size / ms for ms in (high, low)]
        days = [steps * ms / 864e5 for ms in (low, high)]
        return [
            f"milliseconds of a step, predicted {chip.basis}",
            *(f"  {name:<12}{between(*ends, '8.1f')}" for name, ends in rows.items()),
            f"  MFU{' at most' * (chip.basis == BY_ROOFLINE)} {between(*mfu, '.0%')}, {between(*images, ',.0f')} images/s, "
            f"{steps:,} steps in {between(*days, '.1f')} days",
            "left out: waits between operations, input, checkpoints, measurements",
        ]


def between(low: float, high: float, form: str) -> str:
    """Both ends, or one where they read the same."""
    first, last = f"{low:{form}}", f"{high:{form}}".strip()
    return first if first.strip() == last else f"{first} .. {last}"


def predict(text: str, chip: Chip, count: int) -> Prediction:
    """The time of a compiled step.

    Args:
        text: of it, `compiled.as_text()`.
        count: how many chips share the step.
    """
    program = hlo.Program(text, count)
    return of_operations(program, program.executed(), chip)


def of_operations(
    program: hlo.Program, operations: Iterable[tuple[hlo.Operation, float]], chip: Chip
) -> Prediction:
    """The time of some of a program's operations, each with how often it runs."""
    times: dict[str, list[float]] = {name: [0.0, 0.0] for name in CLASSES}
    traffic = 0.0
    for operation, repeats in operations:
        traffic += repeats * program.bytes(operation) / (1e6 * chip.bandwidth)
        low, high = milliseconds(program, operation, chip)
        entry = times[class_of(program, operation)]
        entry[0] += repeats * low
        entry[1] += repeats * high
    return Prediction({name: (low, high) for name, (low, high) in times.items()}, traffic)


def milliseconds(program: hlo.Program, op: hlo.Operation, chip: Chip) -> tuple[float, float]:
    """The lower and the upper end of one run of an operation."""
    if program.is_collective(op):
        time = program.moved(op) / (2e6 * chip.link)
        # What is begun early runs next to other work.
        return (0.0 if op.is_begun else time), time
    if op.is_prefetch:
        return 0.0, 0.0
    kernel = chip.kernels if op.is_attention else 0.0
    compute = sum(
        flops / (1e9 * (kernel or chip.tflops[precision]))
        for flops, precision in program.products(op)
    )
    low = max(compute, program.bytes(op) / (1e6 * chip.bandwidth))
    return low, max(low, op.cycles / (1e6 * chip.clock) if chip.clock else 0.0)


def class_of(program: hlo.Program, op: hlo.Operation) -> str:
    if program.is_collective(op):
        return "collectives"
    if op.is_attention or re.search(r"splash|bht[sd]", op.name + op.scope):
        return "attention"
    if program.products(op):
        return "products"
    # Networks, the gradient of the loss and choices by platform stand in the path to an operation.
    outside = op.scope and "/" not in re.sub(r"jit\([^)]*\)/|_gradients/", "", op.scope)
    return "optimizer" if outside else "rest"
