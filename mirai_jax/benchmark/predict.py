"""How long a TPU takes for a compiled train step: a prediction, for chips that are not here.

The compiler writes into its program how many cycles each operation will take by its model of the chip. That
is the upper end of the range. The model takes every operand from main memory, and in the end many lie in the
chip's fast memory; so the lower end is what arithmetic and main memory alone allow: the larger of an
operation's multiplications at the peak rate and of its bytes outside the fast memory at full bandwidth.
Collectives have no cycles: they are counted by bytes on both links of a ring, those begun early in the
upper end alone.

Left out: waits between operations, the input pipeline, checkpoints and measurements. Nothing here was
compared with a chip.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {"bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
_TYPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(?::((?:[^{}]|\{[^}]*\})*))?\})?")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<kind>[\w\-]+)"
    r"\((?P<arguments>.*?)\)(?P<rest>.*)$"
)
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = re.compile(
    "get-tuple-element|tuple|bitcast|parameter|constant|after-all|partition-id|opt-barrier"
    "|(copy|slice)-start|.*-done"
)
CLASSES = ("products", "attention", "optimizer", "collectives", "rest")
# Attention kernels carry no cycles: what their schedule on v5e reaches at 256 tokens (50 on v6e).
_KERNEL_TFLOPS = 40


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A chip: peak bfloat16 TFLOP/s, clock in GHz, GB/s of main memory and of one link."""

    tflops: float
    clock: float
    bandwidth: float
    link: float


# Cloud TPU's documentation; the clock is what makes its matrix units reach the peak.
TPUS = {
    "v4": Tpu(275, 1.05, 1228, 50),
    "v5e": Tpu(197, 1.5, 819, 45),
    "v5p": Tpu(459, 1.75, 2765, 90),
    "v6e": Tpu(918, 1.75, 1640, 90),
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Milliseconds of a step by class of work: the lower and the upper end."""

    classes: dict[str, tuple[float, float]]

    @property
    def total(self) -> tuple[float, float]:
        low, high = zip(*self.classes.values(), strict=True)
        return sum(low), sum(high)

    def lines(self, chip: Tpu, flops: float, batch_size: int, steps: int) -> list[str]:
        """A table for the screen; `flops` by formula, of one chip's share of a step."""
        rows = {**self.classes, "in all": self.total}
        low, high = self.total
        mfu = [flops / (1e9 * chip.tflops * ms) for ms in (high, low)]
        return [
            "milliseconds of a step, predicted by the compiler's model (nothing was run)",
            *(f"  {name:<12}{a:8.1f} .. {b:.1f}" for name, (a, b) in rows.items()),
            f"  MFU {mfu[0]:.0%} .. {mfu[1]:.0%}, {1e3 * batch_size / high:,.0f} .. "
            f"{1e3 * batch_size / low:,.0f} images/s, {steps:,} steps in {steps * low / 864e5:.1f} .. "
            f"{steps * high / 864e5:.1f} days",
            "left out: waits between operations, input, checkpoints, measurements",
        ]


@dataclasses.dataclass(frozen=True)
class _Operation:
    name: str
    type: str
    kind: str
    arguments: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([^\s,)]+)", self.arguments)

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=%([^\s,)]+)", self.rest)
        return found[1] if found else ""

    @property
    def is_alias(self) -> bool:
        return self.kind == "custom-call" and "tpu_custom_call" not in self.rest

    @property
    def scope(self) -> str:
        """Where in the model it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0


def predict(text: str, chip: Tpu, chips: int) -> Prediction:
    """The time of a program that the compiler for TPUs has made.

    Args:
        text: of the compiled step, `compiled.as_text()`.
        chips: how many share the step.
    """
    program = _Program(text, chips)
    times: dict[str, list[float]] = {name: [0.0, 0.0] for name in CLASSES}
    for operation, repeats in program.executed():
        low, high = program.milliseconds(operation, chip)
        entry = times[program.class_of(operation)]
        entry[0] += repeats * low
        entry[1] += repeats * high
    return Prediction({name: (low, high) for name, (low, high) in times.items()})


class _Program:
    """An HLO module by its text."""

    def __init__(self, text: str, chips: int):
        self.chips = chips
        self.computations: dict[str, list[_Operation]] = {}
        current: list[_Operation] = []
        for line in text.splitlines():
            begun = re.match(r"^(ENTRY )?%(\S+) \(", line)
            if begun:
                current = self.computations[begun[2]] = []
                self.entry = begun[2] if begun[1] else getattr(self, "entry", "")
            elif found := _INSTRUCTION.match(line):
                current.append(_Operation(**found.groupdict()))
        self.by_name = {op.name: op for ops in self.computations.values() for op in ops}

    def executed(self) -> Iterator[tuple[_Operation, float]]:
        """Yields (operation, how often it runs), of loops the operations of their bodies."""
        queue = collections.deque([(self.entry, 1)])
        while queue:
            name, repeats = queue.popleft()
            for op in self.computations.get(name, ()):
                if op.kind == "while":
                    queue.append((op.attribute("body"), repeats * self._trips(op)))
                elif op.kind in ("call", "async-start"):
                    queue.append((op.attribute("to_apply") or op.attribute("calls"), repeats))
                elif op.kind == "conditional":
                    branches = re.findall(r"%([^\s,)}]+)", op.rest.split("metadata=")[0])
                    queue.extend((branch, repeats / len(branches)) for branch in branches)
                elif not (_FREE.fullmatch(op.kind) or op.is_alias):
                    yield op, repeats

    def _trips(self, loop: _Operation) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition"), ())
        bounds = [
            int(op.arguments)
            for op in condition
            if op.kind == "constant" and op.arguments.isdigit()
        ]
        return max(bounds, default=1)

    def milliseconds(self, op: _Operation, chip: Tpu) -> tuple[float, float]:
        """The lower and the upper end."""
        if self._collective(op):
            time = self._moved(op) / (2e6 * chip.link)
            # What is begun early runs beside other work.
            return (0.0 if op.kind.endswith("-start") else time), time
        flops = self.flops(op)
        compute = flops / (1e9 * (_KERNEL_TFLOPS if op.kind == "custom-call" else chip.tflops))
        low = max(compute, self._bytes(op) / (1e6 * chip.bandwidth))
        return low, max(low, op.cycles / (1e6 * chip.clock))

    def _moved(self, op: _Operation) -> float:
        """Bytes through the links of each chip, which has two: a sum goes around a ring twice."""
        given = sum(_size(self.by_name[name].type) for name in op.operands if name in self.by_name)
        size = max(given, _size(op.type) - given * op.kind.endswith("-start"))
        groups = re.search(r"replica_groups=\[\d+,(\d+)\]", op.rest)
        ways = int(groups[1]) if groups else self.chips
        twice = 2 if "all-reduce" in op.kind + op.name else 1
        return size * twice * (ways - 1) / ways

    def _bytes(self, op: _Operation) -> float:
        """Bytes of results and operands in main memory; of what is sliced or updated, the slice."""
        arrays = _arrays(op.type)
        for name in op.operands:
            given = self.by_name.get(name)
            arrays += _arrays(given.type)[:1] if given and given.kind != "tuple" else []
        sizes = [size for size, outside in arrays if outside]
        if re.search("gather|dynamic|slice", op.name) or op.kind.startswith("dynamic"):
            whole = max(sizes, default=0)  # read or written in part
            sizes = [size for size in sizes if size < whole]
        return sum(sizes)

    def flops(self, op: _Operation) -> float:
        """Of its convolutions, which is what products become, and of attention kernels."""
        if op.kind == "fusion":
            return sum(map(self.flops, self._called(op)))
        types = [
            op.type,
            *(self.by_name[name].type for name in op.operands if name in self.by_name),
        ]
        if op.kind == "custom-call" and "splash" in op.name:
            # Queries and keys by heads lead; five products backward, two forward.
            *lead, length, width = max(map(_dimensions, types), key=len)
            return (10 if "dkv" in op.name else 4) * math.prod(lead) * length**2 * width
        if op.kind not in ("convolution", "dot"):
            return 0
        # A size stands in two of the three arrays; that of a batch of products, in all.
        sizes = math.prod(math.prod(_dimensions(of)) for of in types[:3])
        return 2 * math.sqrt(sizes / _products(op))

    def _called(self, op: _Operation) -> list[_Operation]:
        return self.computations.get(op.attribute("calls"), [])

    def _collective(self, op: _Operation) -> bool:
        """A fusion with one, too: unless it is hidden behind a product."""
        if op.kind == "fusion":
            inside = self._called(op)
            return any(map(self._collective, inside)) and not self.flops(op)
        return op.kind.removesuffix("-start") in _COLLECTIVES

    def class_of(self, op: _Operation) -> str:
        if self._collective(op):
            return "collectives"
        if re.search(r"splash|bht[sd]", op.name + op.scope):
            return "attention"
        if self.flops(op):
            return "products"
        # What belongs to a network or to the gradient of the loss says so: its module begins with a capital.
        outside = op.scope and not re.search(r"jvp|[A-Z]\w*[/.)]", op.scope)
        return "optimizer" if outside else "rest"


def _products(op: _Operation) -> int:
    """How many products a convolution is: a batch is a window as long as its dilation."""
    size, dilation = (re.search(rf"\b{name}=([\dx]+)", op.rest) for name in ("size", "lhs_dilate"))
    if not (size and dilation):
        return 1
    pairs = zip(size[1].split("x"), dilation[1].split("x"), strict=True)
    return math.prod(int(a) for a, b in pairs if a == b)


def _dimensions(type_: str) -> list[int]:
    found = _TYPE.search(type_)
    return [int(n) for n in found[2].split(",") if n] if found else []


def _arrays(type_: str) -> list[tuple[int, bool]]:
    """Of each array of a type: bytes, and whether they lie in main memory."""
    return [
        (_BYTES.get(kind, 1) * math.prod(int(n) for n in sizes.split(",") if n), "S(" not in layout)
        for kind, sizes, _, layout in _TYPE.findall(type_)
    ]


def _size(type_: str) -> int:
    return sum(size for size, _ in _arrays(type_))
