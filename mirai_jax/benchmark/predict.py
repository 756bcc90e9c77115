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
from collections.abc import Callable, Iterable

import jax

from mirai_jax.benchmark import chips, hlo, measure

CLASSES = ("products", "attention", "optimizer", "collectives", "rest")
_BY_COMPILER = "by the compiler's model of the chip; nothing was run"
_BY_ROOFLINE = "at the least, if products and memory reached the datasheet's rates; nothing was run"


@dataclasses.dataclass(frozen=True)
class Chip:
    """What bounds a chip.

    Attributes:
        tflops: TFLOP/s of products by `hlo.Program.products`' precisions.
        bandwidth: GB/s of main memory.
        link: GB/s of one of the two links of a ring.
        clock: GHz of the compiler's cycles; 0: it gives none.
        kernels: TFLOP/s that fused attention reaches at 256 tokens by its schedule; 0: not known.
        memory: GiB; 0: not known.
        basis: what a prediction rests on, for the screen.
    """

    tflops: dict[str, float]
    bandwidth: float
    link: float
    clock: float = 0.0
    kernels: float = 0.0
    memory: int = 0
    basis: str = ""


def _tpu(
    tflops: float, clock: float, bandwidth: float, link: float, memory: int, kernels: float
) -> Chip:
    # A float32 product of 'high' takes three passes over bfloat16 parts, 'highest' six.
    rates = {"bfloat16": tflops, "default": tflops, "high": tflops / 3, "highest": tflops / 6}
    return Chip(rates, bandwidth, link, clock, kernels, memory, _BY_COMPILER)


def _gpu(name: str, tflops: float, single: float, link: float) -> Chip:
    # TensorFloat-32 at half of bfloat16's rate, unless 'highest' asks for float32 units.
    half = tflops / 2
    rates = {"bfloat16": tflops, "default": half, "high": half, "highest": single}
    return Chip(rates, chips.GPUS[name].bandwidth, link, basis=_BY_ROOFLINE)


# Cloud TPU's documentation, NVIDIA's datasheets (NVLink: half of what both directions carry, over two
# links). A TPU's clock is what makes its matrix units reach the peak; the rates of attention kernels are
# known of v5e and v6e.
CHIPS = {
    "v4": _tpu(275, 1.05, 1228, 50, 32, 40),
    "v5e": _tpu(197, 1.5, 819, 45, 16, 40),
    "v5p": _tpu(459, 1.75, 2765, 90, 95, 40),
    "v6e": _tpu(918, 1.75, 1640, 90, 32, 50),
    "a100": _gpu("a100", 312, 19.5, 150),
    "h100": _gpu("h100", 989, 67, 225),
    "h200": _gpu("h200", 989, 67, 225),
}


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
    return Chip(rates, memory / 1e9, 1.0, basis=basis)


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
            f"  MFU{' at most' * (chip.basis == _BY_ROOFLINE)} {between(*mfu, '.0%')}, {between(*images, ',.0f')} images/s, "
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
