"""How activations are split over a mesh of devices.

Both the parameters and the batch are split over `fsdp`. Without constraints the compiler may leave
the parameters in place and give every device the whole batch. With activations constrained to be
split by batch it gathers the parameters of one layer at a time, which saves memory.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

# The kinds of dimensions of an activation, and the mesh axes that split them.
_AXES = {
    "batch": ("data", "fsdp"),
    "heads": ("tensor",),
    "features": ("tensor",),
    "width": ("fsdp",),
    None: (),
}


def shard_activation(x: jax.Array, *dimensions: str | None) -> jax.Array:
    """Splits an activation over the training mesh of `jax.set_mesh`; without that mesh returns x.

    Args:
        dimensions: the kinds of its leading dimensions: 'batch', 'heads', 'features' or None (whole).
    """
    mesh = _training_mesh()
    if mesh is None:
        return x
    spec, _ = _spec(mesh, x.shape, dimensions)
    return jax.lax.with_sharding_constraint(x, spec)


def look_up(table_VxD: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of an embedding table.

    The rows are brought together first: left split over `tensor`, they would move between slices.
    """
    return jnp.take(shard_activation(table_VxD, None, "width"), indices, axis=0)


def per_device(
    function: Callable[..., jax.Array], shape: tuple[int, ...], *dimensions: str | None
) -> Callable[..., jax.Array] | None:
    """Runs on each device's part of the arrays a function that the compiler cannot split.

    Args:
        function: maps arrays of `shape` to an array of `shape`, part by part.
        dimensions: as in `shard_activation`.

    Returns:
        The function of whole arrays. None where the mesh does not divide them, and on several
        devices without a training mesh.
    """
    mesh = _training_mesh()
    if mesh is None:
        return function if jax.device_count() == 1 else None
    if mesh.size == 1:
        return function
    spec, divides = _spec(mesh, shape, dimensions)
    if not divides:
        return None
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)


def _training_mesh() -> jax.sharding.AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if {"data", "fsdp", "tensor"} <= set(mesh.axis_names) else None


def _spec(mesh, shape, dimensions) -> tuple[P, bool]:
    """The partition of an array, and whether the mesh divides every dimension that it should."""
    kept = []
    for dimension, size in zip(dimensions, shape, strict=False):
        axes = _AXES[dimension]
        ways = math.prod(mesh.shape[name] for name in axes)
        kept.append(axes if size % ways == 0 else None)
    return P(*kept), None not in kept
