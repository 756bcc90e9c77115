"""What chips can do, by their makers: the one table for MFU and for predictions.

A device is in it only by its exact name. Cards of one family differ: an H100 for PCIe multiplies at three
quarters of the rate of one on a board, and reads at 60%.
"""

import dataclasses

BY_COMPILER = "by the compiler's model of the chip; nothing was run"
BY_ROOFLINE = "at the least, if products and memory reached the datasheet's rates; nothing was run"


@dataclasses.dataclass(frozen=True)
class Chip:
    """What bounds a chip.

    Attributes:
        tflops: TFLOP/s of products by `hlo.Program.products`' precisions.
        bandwidth: GB/s of main memory.
        link: GB/s of one of the two links of a ring; 0: not known, one chip alone has predictions.
        clock: GHz of the compiler's cycles; 0: it gives none.
        kernels: TFLOP/s that fused attention reaches at 256 tokens by its schedule; 0: not known.
        memory: GiB; 0: not known.
        basis: what a prediction rests on, for the screen.
        kinds: what JAX calls it, `jax.Device.device_kind`.
    """

    tflops: dict[str, float]
    bandwidth: float
    link: float = 0.0
    clock: float = 0.0
    kernels: float = 0.0
    memory: int = 0
    basis: str = ""
    kinds: tuple[str, ...] = ()


def _tpu(
    tflops: float,
    clock: float,
    bandwidth: float,
    link: float,
    memory: int,
    kernels: float,
    *kinds: str,
) -> Chip:
    # A float32 product of 'high' takes three passes over bfloat16 parts, 'highest' six.
    rates = {"bfloat16": tflops, "default": tflops, "high": tflops / 3, "highest": tflops / 6}
    return Chip(rates, bandwidth, link, clock, kernels, memory, BY_COMPILER, kinds)


def _gpu(tflops: float, single: float, bandwidth: float, link: float, *kinds: str) -> Chip:
    # TensorFloat-32 at half of bfloat16's rate, unless 'highest' asks for float32 units.
    half = tflops / 2
    rates = {"bfloat16": tflops, "default": half, "high": half, "highest": single}
    return Chip(rates, bandwidth, link, basis=BY_ROOFLINE, kinds=kinds)


# Cloud TPU's documentation, NVIDIA's datasheets without sparsity (NVLink: half of what both directions carry,
# over two links). A TPU's clock is what makes its matrix units reach the peak; the rates of attention kernels
# are known of v5e and v6e.
CHIPS = {
    "v4": _tpu(275, 1.05, 1228, 50, 32, 40, "TPU v4"),
    "v5e": _tpu(197, 1.5, 819, 45, 16, 40, "TPU v5 lite", "TPU v5e"),
    "v5p": _tpu(459, 1.75, 2765, 90, 95, 40, "TPU v5", "TPU v5p"),
    "v6e": _tpu(918, 1.75, 1640, 90, 32, 50, "TPU v6 lite", "TPU v6e"),
    "a100": _gpu(312, 19.5, 2039, 150, "NVIDIA A100-SXM4-80GB"),
    "a100-40gb": _gpu(312, 19.5, 1555, 150, "NVIDIA A100-SXM4-40GB"),
    "a100-pcie": _gpu(312, 19.5, 1935, 0, "NVIDIA A100 80GB PCIe"),
    "a100-pcie-40gb": _gpu(312, 19.5, 1555, 0, "NVIDIA A100-PCIE-40GB"),
    "h100": _gpu(989, 67, 3350, 225, "NVIDIA H100 80GB HBM3"),
    "h100-pcie": _gpu(756, 51, 2000, 0, "NVIDIA H100 PCIe"),
    "h100-nvl": _gpu(835, 60, 3900, 0, "NVIDIA H100 NVL"),
    "h200": _gpu(989, 67, 4800, 225, "NVIDIA H200"),
    "gh200": _gpu(989, 67, 4000, 0, "NVIDIA GH200 480GB"),
}


def of_kind(kind: str) -> Chip | None:
    """The chip that JAX calls `kind`; None: not known."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
