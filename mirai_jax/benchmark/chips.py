"""Chips to compile for without having them: XLA's compilers need only their plugin.

The compiled programs can be inspected (`memory_plan.compile_step`), not run. On a GPU's own machine XLA
also times kernels and takes the fastest; here it takes its first choice. Attention is planned with the
fused kernel of the chip whose plugin is installed (models/attention.py): install one plugin, not both.
"""

import dataclasses
import os
import re

import jax
from jax.experimental import topologies

from mirai_jax.benchmark.rates import CHIPS
from mirai_jax.utils.errors import ConfigError, first_line


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks about a GPU: its datasheet and the limits of its compute capability."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of each
    clock: float  # GHz
    memory: int  # GiB available to programs
    bandwidth: float  # GB/s
    cache: int  # MiB, level 2
    shared: int  # KiB of shared memory a core; a block gets 1 less

    def text(self) -> str:
        """XLA's GpuTargetConfigProto in text form."""
        major, minor = self.capability
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 12 minor: 8 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.cores}
              fpus_per_core: {self.lanes}
              clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory << 30}
              memory_bandwidth: {int(self.bandwidth * 1e9)}
              l2_cache_size: {self.cache << 20}
              shared_memory_per_core: {self.shared << 10}
              shared_memory_per_block_optin: {self.shared - 1 << 10}
              shared_memory_per_block: {48 << 10}
              threads_per_core_limit: 2048
              threads_per_block_limit: 1024
              threads_per_warp: 32
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}"""


GPUS = {
    "a100": Gpu("NVIDIA A100 80GB", (8, 0), 108, 64, 1.41, 79, CHIPS["a100"].bandwidth, 40, 164),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 79, CHIPS["h100"].bandwidth, 50, 228
    ),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 1.98, 140, CHIPS["h200"].bandwidth, 50, 228),
}


_FRACTION = "XLA_CLIENT_MEM_FRACTION"


def verdict(gpu: str, needed: int) -> str:
    """Whether `needed` bytes fit into the share of a GPU's memory that JAX takes, by default 3/4."""
    has, fraction = GPUS[gpu].memory, float(os.environ.get(_FRACTION, 0.75))
    message = f"of {has:,} GiB, {fraction * has:.1f} of which JAX takes ({_FRACTION}={fraction:g})"
    needed_fraction = needed / (has << 30)
    if needed_fraction < fraction:
        return message
    enough = (
        f"; {_FRACTION}={needed_fraction + 0.02:.2f} would do" if needed_fraction < 0.93 else ""
    )
    return f"{message}: it does not fit{enough}"


def devices(name: str, count: int | None = None, slices: int = 1) -> list[jax.Device]:
    """`count` devices to compile for. Call it before JAX looks for its own devices.

    Args:
        name: of GPUS, all of one host; or a TPU slice by its XLA name, 'v5e:2x4'.
        count: number of devices; None: one GPU, or all of the slices.
        slices: how many such TPU slices.

    Raises:
        ConfigError: an unknown chip, another number of devices in the slices, or a compiler that is
            not installed.
    """
    if name in GPUS:
        count = count or 1
        # Compiling needs neither a driver nor GPUs to try kernels on.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
        given = {"platform": "cuda", "topology": f"1x1x{count}", "target_config": GPUS[name].text()}
        extra = "cuda"
    elif re.fullmatch(r"v\d\w*:\d+(x\d+)+", name):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks its host's metadata server
        given, extra = {"platform": "tpu", "topology_name": name}, "tpu"
        given |= {"num_slices": slices} if slices > 1 else {}
    else:
        known = ", ".join(GPUS)
        raise ConfigError(f"the chip is {name!r}; it must be {known} or a TPU slice like v5e:2x4")
    jax.config.update("jax_platforms", "cpu")
    try:
        found = list(topologies.get_topology_desc(**given).devices)
    except Exception as error:  # each plugin has its own
        raise ConfigError(
            f"the chip is {name!r}, unknown to its compiler, or the compiler is not installed "
            f"(pip install '.[{extra}]'): {first_line(error)[:200]}"
        ) from error
    if count not in (None, len(found)):
        raise ConfigError(f"the chip {name!r} has {len(found)} devices, not {count}")
    return found
