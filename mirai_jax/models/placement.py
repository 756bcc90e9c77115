"""Where activations lie on a mesh of devices.

Parameters are split over `fsdp`, and so is the batch. Left alone, the compiler may keep both where
they are by giving every device the whole batch; told that activations are split by batch, it gathers
one layer's parameters at a time instead, which is what saves memory.
"""

import jax
from jax.sharding import PartitionSpec as P

# What a dimension of an activation may be, and the mesh axes that split it.
_AXES = {"batch": ("data", "fsdp"), "heads": "tensor", "features": "tensor", None: None}


def spread(x: jax.Array, *dimensions: str | None) -> jax.Array:
    """Splits an activation over the training mesh of `jax.set_mesh`; does nothing on another or none.

    Args:
        x: any array.
        dimensions: of its leading dimensions: 'batch', 'heads', 'features' or None (whole).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not {"data", "fsdp", "tensor"} <= set(mesh.axis_names):
        return x

    def fits(axes: str | tuple[str, ...] | None, size: int) -> bool:
        names = (axes,) if isinstance(axes, str) else axes or ()
        ways = 1
        for name in names:
            ways *= mesh.shape[name]
        return size % ways == 0

    axes = (_AXES[dimension] for dimension in dimensions)
    kept = [a if fits(a, size) else None for a, size in zip(axes, x.shape, strict=False)]
    return jax.lax.with_sharding_constraint(x, P(*kept))
