"""Where activations lie on a mesh of devices.

Parameters are split over `fsdp`, and so is the batch. Left alone, the compiler may keep both where
they are by giving every device the whole batch; told that activations are split by batch, it gathers
one layer's parameters at a time instead, which is what saves memory.
"""

import math

import jax
from jax.sharding import PartitionSpec as P

# What a dimension of an activation may be, and the mesh axes that split it.
_AXES = {"batch": ("data", "fsdp"), "heads": ("tensor",), "features": ("tensor",), None: ()}


def spread(x: jax.Array, *dimensions: str | None) -> jax.Array:
    """Splits an activation over the training mesh of `jax.set_mesh`; does nothing on another or none.

    Args:
        x: any array.
        dimensions: of its leading dimensions: 'batch', 'heads', 'features' or None (whole).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not {"data", "fsdp", "tensor"} <= set(mesh.axis_names):
        return x
    kept = []
    for dimension, size in zip(dimensions, x.shape, strict=False):
        axes = _AXES[dimension]
        ways = math.prod(mesh.shape[name] for name in axes)
        kept.append(axes if size % ways == 0 else None)
    return jax.lax.with_sharding_constraint(x, P(*kept))
