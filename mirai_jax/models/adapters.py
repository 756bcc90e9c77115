"""Low-rank adapters (LoRA, arXiv 2106.09685) of the generator's blocks: W + alpha / rank * A B.

A `Linear` whose parameters hold `lora_a` and `lora_b` beside `kernel` adds their product to the kernel,
block by block: the train step stores no gradient as large as the weights and, with `model.remat`, no
second copy of them. `merge` gives the same weights without adapters, for all that is not training.

Of the generator only the adapters and the class table are trained (BASE lists the rest): a new class
needs its row, and the other tensors are the pretrained ones.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

# Adapted kernels by module, with the number of input dimensions between the layer axis and the outputs.
_INPUTS = {"attention": {"wqkv": 1, "wo": 2}, "feed_forward": {"w1": 1, "w2": 1, "w3": 1}}

# Patterns of the names of the parameters that a run with adapters does not train.
BASE = ("generator/*/kernel", "generator/*/scale", "generator/tok_embeddings/*")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """`rank` 0 means no adapters. The product of an adapter counts `alpha / rank` times."""

    rank: int = 0
    alpha: float = 16.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def add(generator: Any, config: LoraConfig, key: jax.Array) -> Any:
    """The generator's parameters with fresh adapters: A is N(0, 1 / inputs), B is zero.

    For a kernel (N, *inputs, *outputs), A is (N, *inputs, rank) and B is (N, rank, *outputs), float32.
    """
    layers = dict(generator["layers"])
    for part, kernels in _INPUTS.items():
        layers[part] = dict(layers[part])
        for name, inputs in kernels.items():
            shape, key = layers[part][name]["kernel"].shape, jax.random.fold_in(key, 0)
            depth, fan_in, outputs = shape[:1], shape[1 : 1 + inputs], shape[1 + inputs :]
            a = jax.nn.initializers.normal(math.prod(fan_in) ** -0.5)
            layers[part][name] = {
                **layers[part][name],
                "lora_a": a(key, (*depth, *fan_in, config.rank), jnp.float32),
                "lora_b": jnp.zeros((*depth, config.rank, *outputs), jnp.float32),
            }
    return {**generator, "layers": layers}


def scaled(params: Any, config: LoraConfig) -> Any:
    """The parameters as `Linear` takes them: B times `scale`. Without adapters they stay as they are."""
    if not config.rank:
        return params
    of_b = lambda path, x: x * config.scale if path[-1].key == "lora_b" else x
    return jax.tree_util.tree_map_with_path(of_b, params)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A (*inputs, rank) times B (rank, *outputs): (*inputs, *outputs), float32."""
    return jnp.tensordot(a, b, 1, precision="highest")


@jax.jit
def _sum(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return kernel + jax.vmap(product)(a, b)


def merge(params: Any, config: LoraConfig) -> Any:
    """The effective weights, in the tree of a generator without adapters."""
    if not isinstance(params, dict):
        return params
    if "lora_a" in params:
        a, b = params["lora_a"], params["lora_b"] * config.scale
        return {"kernel": _sum(params["kernel"], a, b)}
    return {name: merge(part, config) for name, part in params.items()}
