"""Where activations lie on a mesh of devices.

Parameters are split over `fsdp`, and so is the batch. Left alone, the compiler may keep both where
they are by giving every device the whole batch; told that activations are split by batch, it gathers
one layer's parameters at a time instead, which is what saves memory.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

# What a dimension of an activation may be, and the mesh axes that split it.
_AXES = {"batch": ("data", "fsdp"), "heads": ("tensor",), "features": ("tensor",), None: ()}


def shard_activation(x: jax.Array, *dimensions: str | None) -> jax.Array:
    """Splits an activation over the training mesh of `jax.set_mesh`; does nothing on another or none.

    Args:
        x: any array.
        dimensions: of its leading dimensions: 'batch', 'heads', 'features' or None (whole).
    """
    mesh = _training_mesh()
    if mesh is None:
        return x
    spec, _ = _spec(mesh, x.shape, dimensions)
    return jax.lax.with_sharding_constraint(x, spec)


def per_device(
    function: Callable[..., jax.Array], shape: tuple[int, ...], *dimensions: str | None
) -> Callable[..., jax.Array] | None:
    """A function of arrays that every device runs on its own part, where the compiler cannot split it.

    Args:
        function: of arrays of `shape`, to an array of it, each part of which needs only its own.
        shape: of the whole arrays.
        dimensions: as in `shard_activation`.

    Returns:
        The function of whole arrays; None where the mesh does not divide them, or where there is no
        training mesh to say which of several devices hold what.
    """
    mesh = _training_mesh()
    if mesh is None:
        return function if jax.device_count() == 1 else None
    if mesh.size == 1:
        return function
    spec, divides = _spec(mesh, shape, dimensions)
    if not divides:
        return None

    def mapped(*arrays):
        run = jax.shard_map(
            function, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False
        )
        return run(*arrays)

    return mapped


def _training_mesh() -> jax.sharding.AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if {"data", "fsdp", "tensor"} <= set(mesh.axis_names) else None


def _spec(mesh, shape, dimensions) -> tuple[P, bool]:
    """Where an array lies, and whether the mesh divides all that `dimensions` ask it to."""
    kept = []
    for dimension, size in zip(dimensions, shape, strict=False):
        axes = _AXES[dimension]
        ways = math.prod(mesh.shape[name] for name in axes)
        kept.append(axes if size % ways == 0 else None)
    return P(*kept), None not in kept
