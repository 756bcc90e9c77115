"""32 bits of each array of a state, by which a checkpoint that changed on disk is noticed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fingerprints(tree: Any) -> dict[str, int]:
    """{path: 32 bits} of the arrays of a tree.

    Arrays on devices are read there; all processes that hold shares must call. Arrays on the host
    stay there.
    """
    arrays = by_path(tree)
    if any(isinstance(x, jax.Array) for x in arrays.values()):
        found = jax.device_get(_on_devices(arrays))
    else:
        found = {name: _fingerprint(np.asarray(x), np) for name, x in arrays.items()}
    return {name: int(value) for name, value in found.items()}


def by_path(tree: Any) -> dict[str, Any]:
    """{path: leaf}, the same for tuples, dataclasses and the dictionaries that stand for them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def _fingerprint(x: Any, xp: Any) -> Any:
    """uint32 that changes with any bit of `x`, and not with how `x` lies on devices.

    The bits of each element times an odd number of its position, summed modulo 2**32: a changed bit
    k changes the sum by 2**k times something odd. Integers are summed, so the order does not
    matter. `xp` is jax.numpy or NumPy.
    """
    bits = x.view(f"uint{8 * x.dtype.itemsize}").astype("uint32")
    position = xp.zeros((1,) * x.ndim, "uint32")
    for axis, size in enumerate(x.shape):
        along = xp.arange(size, dtype="uint32").reshape(
            [-1 if i == axis else 1 for i in range(x.ndim)]
        )
        position = position * np.uint32(size) + along
    return xp.sum(bits * (2 * position + 1), dtype="uint32")


@jax.jit
def _on_devices(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _fingerprint(x, jnp) for name, x in arrays.items()}
