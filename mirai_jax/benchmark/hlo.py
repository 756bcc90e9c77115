"""A compiled program by its text: which operations run how often, what they multiply, read and send.

One reading for XLA's compilers for TPUs, GPUs and CPUs. The compiler for TPUs also writes how many cycles
it takes an operation to need, and which arrays lie in the chip's fast memory.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

_BYTES = {"bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
_TYPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(?::((?:[^{}]|\{[^}]*\})*))?\})?")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<kind>[\w\-]+)"
    r"\((?P<arguments>.*?)\)(?P<rest>.*)$"
)
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = re.compile(
    "get-tuple-element|tuple|bitcast|parameter|constant|after-all|partition-id|opt-barrier|.*-done"
)
_PREFETCHES = ("copy-start", "slice-start")


@dataclasses.dataclass(frozen=True)
class Operation:
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
        """A custom call that names memory; kernels are those of Pallas and of NVIDIA's libraries."""
        return self.kind == "custom-call" and not re.search("tpu_custom_call|__cu", self.rest)

    @property
    def is_free(self) -> bool:
        """It takes no time: it names what another operation made, or waits for one that was begun."""
        waits = self.name.startswith("async-collective-done")  # a fusion
        return self.is_alias or waits or bool(_FREE.fullmatch(self.kind))

    @property
    def is_prefetch(self) -> bool:
        """A copy, mostly into fast memory, that runs next to other work."""
        return self.kind in _PREFETCHES

    @property
    def is_begun(self) -> bool:
        """A transfer that runs next to other work; another operation ends it."""
        return self.kind.endswith("-start") or self.name.startswith("async-collective-start")

    @property
    def is_attention(self) -> bool:
        """A fused kernel of attention."""
        return self.kind == "custom-call" and bool(re.search("splash|fmha", self.name + self.rest))

    @property
    def scope(self) -> str:
        """Where in the model it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """By the compiler's model; 0 where it says nothing."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0


class Program:
    """An HLO module.

    Args:
        text: of a compiled function, `compiled.as_text()`.
        chips: how many run it together.
    """

    def __init__(self, text: str, chips: int = 1):
        self.chips = chips
        self.computations: dict[str, list[Operation]] = {}
        current: list[Operation] = []
        for line in text.splitlines():
            begun = re.match(r"^(ENTRY )?%(\S+) \(", line)
            if begun:
                current = self.computations[begun[2]] = []
                self.entry = begun[2] if begun[1] else getattr(self, "entry", "")
            elif found := _INSTRUCTION.match(line):
                current.append(Operation(**found.groupdict()))
        self.by_name = {op.name: op for ops in self.computations.values() for op in ops}

    def loops(self) -> list[tuple[str, int]]:
        """(body, turns) of each loop of the main program."""
        return [
            (op.attribute("body"), self._trips(op))
            for op in self.computations[self.entry]
            if op.kind == "while"
        ]

    def executed(self, start: str = "") -> Iterator[tuple[Operation, float]]:
        """Yields (operation, how often it runs), of loops the operations of their bodies.

        Args:
            start: the computation that runs; '': the main program.
        """
        queue = collections.deque([(start or self.entry, 1)])
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
                elif not op.is_free:
                    yield op, repeats

    def _trips(self, loop: Operation) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition"), ())
        bound = max(map(_number, condition), default=0)
        return max(1, math.ceil(bound / self._stride(loop, condition)))

    def _stride(self, loop: Operation, condition: Sequence[Operation]) -> int:
        """What a turn adds to the number that is compared: products in pieces take two in a turn."""
        body = self.computations.get(loop.attribute("body"), ())
        for op in condition:
            place = re.search(r"index=(\d+)", op.rest) if op.kind == "get-tuple-element" else None
            if place and body and len(body[-1].operands) > int(place[1]):
                new = self.by_name[body[-1].operands[int(place[1])]]
                if new.kind == "add":
                    return max(1, *(_number(self.by_name[name]) for name in new.operands))
        return 1

    def is_collective(self, op: Operation) -> bool:
        """A fusion with one, too: unless it is hidden behind a product."""
        if op.kind == "fusion":
            inside = self._called(op)
            return any(map(self.is_collective, inside)) and not self.products(op)
        return op.kind.removesuffix("-start") in _COLLECTIVES

    def moved(self, op: Operation) -> float:
        """Bytes through the links of each chip by a collective: a sum goes around a ring twice."""
        given = sum(_size(self.by_name[name].type) for name in op.operands if name in self.by_name)
        size = max(given, _size(op.type) - given * op.is_begun)
        inside, kept = self._inside(op), _size(op.type)
        ways = next(filter(None, (_ways(x.rest) for x in inside)), self.chips)
        # A sum of which each chip keeps its part goes around once.
        twice = any(x.kind.startswith("all-reduce") for x in inside) and kept >= given
        return size * (1 + twice) * (ways - 1) / ways

    def bytes(self, op: Operation) -> float:
        """Bytes of results and operands in main memory; of what is sliced or updated, the slice."""
        results = _arrays(op.type)
        if op.is_prefetch:  # the result names both sides, of a slice the whole source
            return min(size for size, _ in results[:2]) * sum(outside for _, outside in results[:2])
        total = sum(size for size, outside in results if outside)
        # An array updated in place is read and written where it changes.
        for update in self._inside(op):
            if update.kind == "dynamic-update-slice" and len(update.operands) > 1:
                size, change = _size(update.type), _size(self.by_name[update.operands[1]].type)
                total -= max(0, size - change) * ((size, True) in results)
        for place, name in enumerate(op.operands):
            given = self.by_name.get(name)
            arrays = _arrays(given.type) if given and given.kind != "tuple" else []
            if arrays and arrays[0][1]:
                total += min(arrays[0][0], self._read(op, place, arrays[0][0]))
        return total

    def _read(self, op: Operation, place: int, size: float) -> float:
        """Bytes that an operation reads of an operand of `size` bytes: all, or the parts it takes."""
        if op.kind in ("slice", "dynamic-slice", "gather") and place == 0:
            return _size(op.type)
        if op.kind == "dynamic-update-slice" and place == 0:
            return 0.0
        if op.kind != "fusion":
            return size
        inside = self._called(op)
        names = [x.name for x in inside if x.kind == "parameter" and x.arguments == str(place)]
        total = size * (inside[-1].kind == "bitcast" and self._passes(op, place))
        for name in names:  # grows by what shares its memory
            for user in (x for x in inside if name in x.operands and x.kind != "tuple"):
                at = user.operands.index(name)
                if self._passes(user, at):
                    names.append(user.name)
                else:
                    total += self._read(user, at, size)
        return total

    def _passes(self, op: Operation, place: int) -> bool:
        """Whether the result is that operand's memory."""
        if op.kind in ("bitcast", "dynamic-update-slice"):
            return place == 0
        if op.kind != "fusion":
            return False
        root = self._called(op)[-1]
        while self._passes(root, 0) and root.operands[0] in self.by_name:
            root = self.by_name[root.operands[0]]
        return root.kind == "parameter" and root.arguments == str(place)

    def _inside(self, op: Operation) -> list[Operation]:
        """The operation, or those of a fusion, of fusions within it too."""
        if op.kind != "fusion":
            return [op]
        return [x for inner in self._called(op) for x in self._inside(inner)]

    def products(self, op: Operation) -> list[tuple[float, str]]:
        """(operations, precision) of each matrix product, convolution and attention kernel in it.

        The precision is 'bfloat16', or of float32 numbers what was asked for: 'default', 'high' or 'highest'.
        """
        if op.kind == "fusion":
            return [product for inside in self._called(op) for product in self.products(inside)]
        types = [self.by_name[name].type for name in op.operands if name in self.by_name]
        if op.is_attention:
            return [(_attention(op, types), "bfloat16")]
        if op.kind == "convolution" or "__cudnn$conv" in op.rest:
            operations = _convolution(op, types)
        elif op.kind == "dot" or re.search(r"__cublas\$(gemm|lt\$matmul)", op.rest):
            # A size stands in two of the three arrays; that of a batch of products, in all.
            dimensions = [_dimensions(of) for of in (op.type, *types[:2])]
            sizes = math.prod(math.prod(of) for of in dimensions)
            operations = 2 * math.sqrt(sizes / _batch(op, dimensions[1]))
        else:
            return []
        asked = re.search(r"operand_precision=\{(\w+)", op.rest)
        single = any(of.startswith("f32") for of in types[:2])
        precision = (asked[1] if asked else "default") if single else "bfloat16"
        return [(operations, precision)]

    def _called(self, op: Operation) -> list[Operation]:
        return self.computations.get(op.attribute("calls"), [])


def _number(op: Operation) -> int:
    """Of a constant; 0 for all else."""
    return int(op.arguments) if op.kind == "constant" and op.arguments.isdigit() else 0


def _attention(op: Operation, types: list[str]) -> float:
    """Operations of a fused kernel: two products forward, five backward, over all pairs of places."""
    products = 5 if re.search("dkv|Backward", op.name + op.rest) else 2
    scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\[([^\]]*)\]', op.rest)
    if scores:  # cuDNN: (B, H, T, S), and the first operand has the queries
        sizes = [int(n) for n in re.findall(r"\d+", scores[1])]
        return 2 * products * math.prod(_dimensions(types[0])) * sizes[-1]
    *lead, length, width = max(map(_dimensions, (op.type, *types)), key=len)
    return 2 * products * math.prod(lead) * length**2 * width


def _batch(op: Operation, left: list[int]) -> int:
    """How many products an operation is; `left` has the sizes of its first operand."""
    batch = re.search(r'lhs_batch_dim(?:s=\{|ensions":\[)([\d,"]+)', op.rest)
    return math.prod(left[int(i)] for i in re.findall(r"\d+", batch[1])) if batch else 1


def _convolution(op: Operation, types: list[str]) -> float:
    """Operations of a convolution, of which only those count whose place of the window is on the input.

    So a matrix product that is written as a convolution has its own number: its batch and what it
    sums over may be windows, most of whose places are beside the input, or between its elements.
    """
    # cuDNN's gradients have the labels and the window of the convolution that they belong to.
    if "convBackwardInput" in op.rest:
        arrays = op.type, types[1], types[0]
    elif "convBackwardFilter" in op.rest:
        arrays = types[0], op.type, types[1]
    else:
        arrays = types[0], types[1], op.type
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", op.rest).groups()
    image, kernel, result = (
        dict(zip(label, _dimensions(array), strict=True))
        for label, array in zip(labels, arrays, strict=True)
    )
    window = re.search(r"\bwindow=\{([^}]*)\}", op.rest)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    operations = 2 * result["b"] * result["f"] * kernel["i"]
    for dimension in filter(str.isdigit, labels[2]):
        take = lambda name, i=int(dimension): fields[name].split("x")[i] if name in fields else "1"
        before = int(take("pad").split("_")[0]) if "pad" in fields else 0
        steps = (int(take(name)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        sizes = image[dimension], kernel[dimension], result[dimension]
        operations *= _meetings(*sizes, before, *steps)
    return operations


@functools.cache
def _meetings(
    image: int, kernel: int, result: int, before: int, stride: int, spread: int, dilation: int
) -> int:
    """How many pairs of a place of the result and one of the window have an element of the input.

    Args:
        image, kernel, result: sizes in one dimension.
        before: padding.
        stride, spread, dilation: steps of the window, of the input's elements and of the window's places.
    """
    starts = stride * np.arange(result) - before
    found = 0
    for place in range(kernel):
        at = starts + dilation * place
        found += np.count_nonzero((at >= 0) & (at < spread * image) & (at % spread == 0))
    return int(found)


def _ways(rest: str) -> int | None:
    """How many chips a collective joins, of whose three forms of `replica_groups` one is in `rest`."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        # A part of an axis has its own size: 'x':(2)4.
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, part in named)
    return None


def _dimensions(type_: str) -> list[int]:
    """Of its first array."""
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
