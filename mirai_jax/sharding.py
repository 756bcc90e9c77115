"""The device mesh, and the table of how each parameter is split over it.

Axes: `data` splits the batch; `fsdp` splits the batch and the parameters; `tensor` splits heads and
FFN columns. Optimizer state and EMA follow the parameter whose path they contain.

Several TPU slices are joined by a slow network: they split `data` alone, so that nothing but
gradients and metrics crosses it.
"""

import functools
import math
import os
import re
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# First match wins. Layers (generator) and heads (foresight, whose transformers consist of blocks) are
# stacked on axis 0, never split.
RULES: tuple[tuple[str, P], ...] = (
    (
        r"(layers|block_\d)/attention/wqkv/kernel",
        P(None, "fsdp", None, "tensor", None),
    ),  # N D 3 H d
    (r"(layers|block_\d)/attention/wo/kernel", P(None, "tensor", None, "fsdp")),  # N H d D
    (r"(layers|block_\d)/feed_forward/w[13]/kernel", P(None, "fsdp", "tensor")),  # N D F
    (r"(layers|block_\d)/feed_forward/w2/kernel", P(None, "tensor", "fsdp")),  # N F D
    # Adapters of these kernels: A has their inputs, B their outputs.
    (r"(wqkv|w[13])/lora_a", P(None, "fsdp")),  # N D r
    (r"(wo|w2)/lora_a", P(None, "tensor")),  # N H d r, N F r
    (r"wqkv/lora_b", P(None, None, None, "tensor")),  # N r 3 H d
    (r"w[13]/lora_b", P(None, None, "tensor")),  # N r F
    (r"(wo|w2)/lora_b", P(None, None, "fsdp")),  # N r D
    (r"cls_embedding/embedding", P(None, "fsdp")),  # classes D
    (r"tok_embeddings/embedding", P("tensor", "fsdp")),  # V D
    (r"foresight/.*/linear_0/kernel", P(None, "fsdp", "tensor")),  # K D P
    (r"foresight/.*/linear_1/kernel", P(None, "tensor", "fsdp")),  # K P P
    (r"foresight/.*/linear_2/kernel", P(None, "fsdp", "tensor")),  # K P Z
    (r"foresight/.*/output/kernel", P(None, "fsdp", "tensor")),  # K D V, K D Z
    (r"output/kernel", P("fsdp", "tensor")),  # D V
    (r".*", P()),  # norms, biases, counters, keys
)

# The compiler for TPUs cuts a product with split weights into pieces, which travel while others are
# multiplied, unless the weights have fewer MiB than this: then they are gathered whole.
_WHOLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def num_slices(devices: list[jax.Device]) -> int:
    """How many TPU slices these are. Hosts with GPUs count as one: any axis may cross them."""
    return len({d.platform == "tpu" and getattr(d, "slice_index", 0) for d in devices})


def mesh_shape(
    data: int, fsdp: int, tensor: int, num_devices: int, slices: int = 1
) -> tuple[int, int, int]:
    """Resolves one -1 (the remaining devices) and checks the product.

    Raises:
        ValueError: names the mesh and the number of devices, of all slices or of one.
    """
    shape = [data, fsdp, tensor]
    described = ", ".join(f"mesh.{a}={n}" for a, n in zip(AXES, shape, strict=True))
    if any(n == 0 or n < -1 for n in shape) or shape.count(-1) > 1:
        raise ValueError(f"{described}: each must be 1 or more, at most one -1 (the rest)")
    known = math.prod(n for n in shape if n != -1)
    if -1 in shape and num_devices % known == 0:
        shape[shape.index(-1)] = num_devices // known
    elif known != num_devices:
        raise ValueError(f"{described}: the product must be {num_devices}, the number of devices")
    if shape[0] % slices:
        axes = "mesh.fsdp" if shape[2] == 1 else "mesh.fsdp * mesh.tensor"
        raise ValueError(
            f"{axes} is {shape[1] * shape[2]}; a slice has {num_devices // slices} devices, and "
            f"mesh.data must be a multiple of {slices}, the number of slices"
        )
    return tuple(shape)


def make_mesh(shape: tuple[int, int, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, tensor) over `devices` (default: all)."""
    devices = jax.devices() if devices is None else devices
    # Not jax.make_mesh: it refuses several slices, and several hosts with GPUs.
    if (slices := num_slices(devices)) > 1:
        inside = (shape[0] // slices, *shape[1:])
        found = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        found = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(found, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fit(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Drops the axes that do not divide their dimension: that dimension is replicated."""
    if len(spec) > len(shape):
        return P()  # an optimizer's scalar or placeholder under a parameter's path
    kept = [
        axis if axis is None or size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    ]
    return P(*kept)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of `tree` (arrays or ShapeDtypeStructs), by RULES."""

    def one(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
        return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over `data` and `fsdp` on their first axis."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def whole_products(rows: NamedSharding | None) -> dict[str, str]:
    """The compiler's options for products with whole weights.

    Where blocks are no loop these are predicted to be faster (docs/performance.md).

    Args:
        rows: `batch_sharding` of the mesh of a step.

    Returns:
        {} where no weights are split, not on TPUs, and where LIBTPU_INIT_ARGS has the option.
    """
    by_user = any(name in os.environ.get("LIBTPU_INIT_ARGS", "") for name in _WHOLE)
    if rows is None or rows.mesh.shape["fsdp"] == 1 or by_user:
        return {}
    mine = [d for d in rows.mesh.devices.flat if d.process_index == jax.process_index()]
    if mine[0].platform != "tpu":
        return {}
    scalar = jax.ShapeDtypeStruct((), np.float32, sharding=SingleDeviceSharding(mine[0]))
    try:  # releases of the compiler differ in what they know
        jax.jit(lambda x: x, compiler_options=_WHOLE).lower(scalar).compile()
    except jax.errors.JaxRuntimeError as error:
        logging.warning("split weights are multiplied in pieces: %s", error)
        return {}
    return _WHOLE


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays, equal in all processes, on the devices by `shardings` (a prefix of the tree)."""

    def one(sharding: NamedSharding, part: Any) -> Any:
        put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
        return jax.tree.map(put, jax.tree.map(np.asarray, part))

    return jax.tree.map(one, shardings, tree)


@functools.lru_cache
def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, ascending.

    Processes that split only `tensor` between them hold the same rows.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Places a batch on the devices.

    Args:
        batch: the `local_rows` of this process of each array.
        batch_size: rows of all processes; None: this process holds them all.
    """
    sharding = batch_sharding(mesh)

    def put(local: np.ndarray) -> jax.Array:
        size = len(local) if batch_size is None else batch_size
        rows = local_rows(mesh, size)

        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = np.searchsorted(rows, start)  # a device's rows are consecutive
            return local[first : first + stop - start]

        return jax.make_array_from_callback((size, *local.shape[1:]), sharding, of_device)

    return {name: put(array) for name, array in batch.items()}
