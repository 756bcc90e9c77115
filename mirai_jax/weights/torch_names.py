"""PyTorch parameter names and layouts <-> Flax trees, strict in both directions.

PyTorch keeps Linear weights as [out, in] and convolutions as [out, in, height, width]; here kernels
are [in, out] and [height, width, in, out]. The generator's attention kernels have axes of heads;
blocks and projectors are stacked on a leading axis. Arrays may be views of the given ones.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.models.vit import VisionTransformer, VitConfig
from mirai_jax.models.vq import VQConfig, VQModel
from mirai_jax.utils.errors import ConfigError

Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


class NamesError(ConfigError):
    """Names or shapes of a state dict are not those of the model: one line that lists them all."""


def check_shapes(state: Arrays, expected: Shapes) -> None:
    """Raises NamesError listing every missing, unexpected or misshapen name."""
    problems = [f"missing {name} {expected[name]}" for name in sorted(expected.keys() - state)]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - expected.keys())]
    problems += [
        f"{name} is {tuple(state[name].shape)}, should be {expected[name]}"
        for name in sorted(expected.keys() & state.keys())
        if tuple(state[name].shape) != expected[name]
    ]
    if problems:
        raise NamesError("parameters do not fit: " + "; ".join(problems))


# Convolutions with batch normalisation ------------------------------------------------------------

_NORM = ("weight", "bias", "running_mean", "running_var")


def folded_shapes(conv: str, norm: str, kernel: tuple[int, ...]) -> Shapes:
    """The names that `folded` takes, with their shapes, for a Flax `kernel` (h, w, in, out)."""
    shapes = {f"{norm}.{part}": kernel[-1:] for part in _NORM}
    return {f"{conv}.weight": tuple(kernel[i] for i in (3, 2, 0, 1)), **shapes}


def folded(state: Arrays, conv: str, norm: str, epsilon: float) -> dict[str, np.ndarray]:
    """A convolution and the batch normalisation after it, as one convolution with bias (float32)."""
    weight, bias, mean, variance = (np.asarray(state[f"{norm}.{p}"], np.float64) for p in _NORM)
    scale = weight / np.sqrt(variance + epsilon)
    kernel = np.asarray(state[f"{conv}.weight"], np.float64).transpose(2, 3, 1, 0)
    return {
        "kernel": np.ascontiguousarray(kernel * scale, np.float32),
        "bias": np.asarray(bias - mean * scale, np.float32),
    }


# One table, two directions ------------------------------------------------------------------------


class _Entry(NamedTuple):
    """A parameter here and in PyTorch, where each block of a stacked one has its own name."""

    path: tuple[str, ...]
    names: list[str]
    stacked: bool
    shape: tuple[int, ...]  # in PyTorch
    flax_shape: tuple[int, ...]  # without the axis of blocks


def _turned(path: tuple[str, ...], array: np.ndarray, back: bool = False) -> np.ndarray:
    """A Flax kernel as PyTorch keeps it (or `back`); anything else as it is."""
    if path[-1] != "kernel":
        return array
    if array.ndim == 4:
        return array.transpose((2, 3, 1, 0) if back else (3, 2, 0, 1))
    return array.T


def _generator_entries(config: GeneratorConfig) -> list[_Entry]:
    """LlamaGen's state dict without projectors. Its attention kernels have axes of heads here."""
    width, ffn, heads = config.width, config.ffn_width, (config.num_heads, config.head_dim)
    table = (config.num_classes + config.has_null_class, width)
    tokens = (config.vocab_size, width)
    once = [
        ("cls_embedding/embedding", "cls_embedding.embedding_table.weight", table, table),
        ("tok_embeddings/embedding", "tok_embeddings.weight", tokens, tokens),
        ("norm/scale", "norm.weight", (width,), (width,)),
        ("output/kernel", "output.weight", tokens, tokens[::-1]),
    ]
    blocks = [
        ("attention_norm/scale", (width,), (width,)),
        ("attention/wqkv/kernel", (3 * width, width), (width, 3, *heads)),
        ("attention/wo/kernel", (width, width), (*heads, width)),
        ("ffn_norm/scale", (width,), (width,)),
        ("feed_forward/w1/kernel", (ffn, width), (width, ffn)),
        ("feed_forward/w3/kernel", (ffn, width), (width, ffn)),
        ("feed_forward/w2/kernel", (width, ffn), (ffn, width)),
    ]
    entries = [_Entry(tuple(p.split("/")), [name], False, *rest) for p, name, *rest in once]
    for path, *shapes in blocks:
        *modules, leaf = path.split("/")
        names = [f"layers.{i}.{'.'.join(modules)}.weight" for i in range(config.num_layers)]
        entries.append(_Entry(("layers", *modules, leaf), names, True, *shapes))
    return entries


_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "embedding.weight"}
# A buffer of the official tokenizer: the codes that its training used last. Not needed here.
_CODEBOOK_USED = "quantize.codebook_used"


@functools.cache
def _entries(config: GeneratorConfig | VQConfig | VitConfig) -> list[_Entry]:
    """The entries of a network; tracing one, whose names are almost PyTorch's, takes a second.

    ('conv_blocks_0', 'conv1', 'kernel') is 'conv_blocks.0.conv1.weight' in PyTorch.
    """
    if isinstance(config, GeneratorConfig):
        return _generator_entries(config)
    if isinstance(config, VQConfig):
        module, side, channels = VQModel(config), config.downsample, config.channels
    else:
        module, side, channels = VisionTransformer(config), config.patch, 3
    image = jax.ShapeDtypeStruct((1, side, side, channels), np.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    entries = []
    for path, leaf in traverse_util.flatten_dict(tree).items():
        stacked = path[0] == "blocks"
        shape = leaf.shape[stacked:]
        modules = [re.sub(r"_(\d+)$", r".\1", module) for module in path[stacked:-1]]
        name = ".".join([*modules, _LEAVES.get(path[-1], path[-1])])
        names = [f"blocks.{i}.{name}" for i in range(leaf.shape[0])] if stacked else [name]
        turned = _turned(path, np.broadcast_to(np.float32(0), shape)).shape
        entries.append(_Entry(path, names, stacked, turned, shape))
    return entries


def from_torch(config: GeneratorConfig | VQConfig | VitConfig, state: Arrays) -> Any:
    """LlamaGen's generator (without projectors) or tokenizer, or a vision transformer -> parameters.

    Raises:
        NamesError: names or shapes differ from `config`; all of them are listed.
    """
    unused = {_CODEBOOK_USED} if isinstance(config, VQConfig) else set()
    entries, own = _entries(config), {n: a for n, a in state.items() if n not in unused}
    check_shapes(own, {name: entry.shape for entry in entries for name in entry.names})
    flat = {}
    for path, names, stacked, _, flax_shape in entries:
        rows = [_turned(path, np.asarray(own[n]), back=True).reshape(flax_shape) for n in names]
        flat[path] = np.stack(rows) if stacked else rows[0]
    return traverse_util.unflatten_dict(flat)


def to_torch(config: GeneratorConfig | VQConfig | VitConfig, params: Any) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`, with the buffer that the official tokenizer also loads."""
    entries = _entries(config)
    flat = {"/".join(path): array for path, array in traverse_util.flatten_dict(params).items()}
    blocks = {entry.path: (len(entry.names),) * entry.stacked for entry in entries}
    check_shapes(flat, {"/".join(e.path): blocks[e.path] + e.flax_shape for e in entries})
    state = {}
    for path, names, stacked, shape, _ in entries:
        array = np.asarray(flat["/".join(path)])
        turned = _turned(path, np.broadcast_to(np.float32(0), shape), back=True).shape
        for name, row in zip(names, array if stacked else [array], strict=True):
            state[name] = _turned(path, row.reshape(turned))
    if isinstance(config, VQConfig):
        state[_CODEBOOK_USED] = np.zeros(65536, np.float32)
    return state


generator_from_torch = vq_from_torch = dinov2_from_torch = from_torch
generator_to_torch = vq_to_torch = dinov2_to_torch = to_torch


# The projectors of foresight ----------------------------------------------------------------------

_PROJECTOR = re.compile(r"projectors\.(\d+)\.([024])\.(weight|bias)")


def projectors_from_torch(state: Arrays, num_heads: int | None = None) -> Any:
    """The official `projectors.K.{0,2,4}.{weight,bias}` -> a term's stacked projectors.

    Names of other parts are ignored, as are projectors after the first `num_heads` (default: all).
    Raises NamesError if a projector is incomplete.
    """
    count = num_heads or len({m[1] for m in map(_PROJECTOR.fullmatch, state) if m})
    rows = {
        (i, part): [f"projectors.{k}.{2 * i}.{part}" for k in range(count)]
        for i in range(3)
        for part in ("weight", "bias")
    }
    missing = sorted({name for names in rows.values() for name in names} - state.keys())
    if missing or not count:
        raise NamesError("parameters do not fit: missing " + "; ".join(missing or ["projectors"]))
    shapes = {name: tuple(state[names[0]].shape) for names in rows.values() for name in names}
    check_shapes({name: state[name] for name in shapes}, shapes)
    tree = {f"linear_{i}": {} for i in range(3)}
    for (i, part), names in rows.items():
        leaf = "kernel" if part == "weight" else part
        tree[f"linear_{i}"][leaf] = np.stack([np.asarray(state[name]).T for name in names])
    return tree


def projectors_to_torch(params: Any) -> dict[str, np.ndarray]:
    """The inverse of `projectors_from_torch`."""
    state = {}
    for i in range(3):
        kernels, biases = params[f"linear_{i}"]["kernel"], params[f"linear_{i}"]["bias"]
        for k in range(len(kernels)):
            state[f"projectors.{k}.{2 * i}.weight"] = np.asarray(kernels[k]).T
            state[f"projectors.{k}.{2 * i}.bias"] = np.asarray(biases[k])
    return state
