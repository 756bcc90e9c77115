"""PyTorch parameter names and layouts <-> Flax trees, strict in both directions.

PyTorch keeps Linear weights as [out, in] and convolutions as [out, in, height, width]; here kernels
are [in, out] and [height, width, in, out]. The generator's attention kernels carry heads as axes of
their own; blocks and projectors are stacked on a leading axis. Arrays may be views of the given
ones: nothing is copied that need not be.
"""

import functools
import re
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.models.vit import DinoConfig, DinoV2
from mirai_jax.models.vq import VQConfig, VQModel

Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


class NamesError(ValueError):
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


# The generator -----------------------------------------------------------------------------------


def _generator_shapes(config: GeneratorConfig) -> Shapes:
    """Every name of LlamaGen's state dict with its shape."""
    width, ffn = config.width, config.ffn_width
    shapes = {
        "cls_embedding.embedding_table.weight": (
            config.num_classes + config.has_null_class,
            width,
        ),
        "tok_embeddings.weight": (config.vocab_size, width),
        "norm.weight": (width,),
        "output.weight": (config.vocab_size, width),
    }
    for i in range(config.num_layers):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * width, width),
            f"layers.{i}.attention.wo.weight": (width, width),
            f"layers.{i}.feed_forward.w1.weight": (ffn, width),
            f"layers.{i}.feed_forward.w3.weight": (ffn, width),
            f"layers.{i}.feed_forward.w2.weight": (width, ffn),
            f"layers.{i}.attention_norm.weight": (width,),
            f"layers.{i}.ffn_norm.weight": (width,),
        }
    return shapes


def generator_from_torch(config: GeneratorConfig, state: Arrays) -> Any:
    """LlamaGen's state dict (no projectors) -> parameters of `Generator(config)`.

    Raises:
        NamesError: names or shapes differ from `config`; all of them are listed.
    """
    check_shapes(state, _generator_shapes(config))
    width, heads, head_dim = config.width, config.num_heads, config.head_dim

    def stacked(name: str, layout=lambda w: w) -> np.ndarray:
        return np.stack(
            [layout(np.asarray(state[f"layers.{i}.{name}"])) for i in range(config.num_layers)]
        )

    def kernel(name: str) -> dict[str, np.ndarray]:
        return {"kernel": stacked(f"{name}.weight", np.transpose)}

    return {
        "cls_embedding": {"embedding": state["cls_embedding.embedding_table.weight"]},
        "tok_embeddings": {"embedding": state["tok_embeddings.weight"]},
        "layers": {
            "attention_norm": {"scale": stacked("attention_norm.weight")},
            "attention": {
                "wqkv": {
                    "kernel": stacked(
                        "attention.wqkv.weight", lambda w: w.T.reshape(width, 3, heads, head_dim)
                    )
                },
                "wo": {
                    "kernel": stacked(
                        "attention.wo.weight", lambda w: w.T.reshape(heads, head_dim, width)
                    )
                },
            },
            "ffn_norm": {"scale": stacked("ffn_norm.weight")},
            "feed_forward": {name: kernel(f"feed_forward.{name}") for name in ("w1", "w2", "w3")},
        },
        "norm": {"scale": state["norm.weight"]},
        "output": {"kernel": np.transpose(state["output.weight"])},
    }


def generator_to_torch(config: GeneratorConfig, params: Any) -> dict[str, np.ndarray]:
    """The inverse of `generator_from_torch`."""
    width, layers = config.width, params["layers"]
    state = {
        "cls_embedding.embedding_table.weight": params["cls_embedding"]["embedding"],
        "tok_embeddings.weight": params["tok_embeddings"]["embedding"],
        "norm.weight": params["norm"]["scale"],
        "output.weight": np.transpose(params["output"]["kernel"]),
    }
    for i in range(config.num_layers):
        qkv = np.asarray(layers["attention"]["wqkv"]["kernel"][i]).reshape(width, 3 * width)
        out = np.asarray(layers["attention"]["wo"]["kernel"][i]).reshape(width, width)
        state[f"layers.{i}.attention.wqkv.weight"] = qkv.T
        state[f"layers.{i}.attention.wo.weight"] = out.T
        for name in ("w1", "w2", "w3"):
            kernel = np.asarray(layers["feed_forward"][name]["kernel"][i])
            state[f"layers.{i}.feed_forward.{name}.weight"] = kernel.T
        for name in ("attention_norm", "ffn_norm"):
            state[f"layers.{i}.{name}.weight"] = layers[name]["scale"][i]
    state = {name: np.asarray(value) for name, value in state.items()}
    check_shapes(state, _generator_shapes(config))
    return state


_PROJECTOR = re.compile(r"projectors\.(\d+)\.([024])\.(weight|bias)")


def projectors_from_torch(state: Arrays, num_heads: int | None = None) -> Any:
    """The official `projectors.K.{0,2,4}.{weight,bias}` -> a term's stacked projectors.

    Args:
        state: a state dict; names of other parts are ignored.
        num_heads: take the first so many (default: all).

    Raises:
        NamesError: a projector is incomplete, or fewer than `num_heads` are there.
    """
    found = {m.groups() for m in map(_PROJECTOR.fullmatch, state) if m}
    count = len({head for head, _, _ in found})
    wanted = count if num_heads is None else num_heads
    missing = [
        f"projectors.{k}.{i}.{part}"
        for k in range(wanted)
        for i in (0, 2, 4)
        for part in ("weight", "bias")
        if (str(k), str(i), part) not in found
    ]
    if missing or not wanted:
        raise NamesError("parameters do not fit: missing " + "; ".join(missing or ["projectors"]))
    own = {name: array for name, array in state.items() if _PROJECTOR.fullmatch(name)}
    first = {m.groups()[1:]: own[m[0]].shape for m in map(_PROJECTOR.fullmatch, own) if m[1] == "0"}
    check_shapes(own, {name: first[_PROJECTOR.fullmatch(name).groups()[1:]] for name in own})

    def stacked(i: int, part: str) -> np.ndarray:
        return np.stack(
            [np.asarray(state[f"projectors.{k}.{2 * i}.{part}"]) for k in range(wanted)]
        )

    return {
        f"linear_{i}": {
            "kernel": stacked(i, "weight").transpose(0, 2, 1),
            "bias": stacked(i, "bias"),
        }
        for i in range(3)
    }


def projectors_to_torch(params: Any) -> dict[str, np.ndarray]:
    """The inverse of `projectors_from_torch`."""
    state = {}
    for i in range(3):
        kernels, biases = params[f"linear_{i}"]["kernel"], params[f"linear_{i}"]["bias"]
        for k in range(len(kernels)):
            state[f"projectors.{k}.{2 * i}.weight"] = np.asarray(kernels[k]).T
            state[f"projectors.{k}.{2 * i}.bias"] = np.asarray(biases[k])
    return state


# Modules whose parameters are named as in PyTorch -------------------------------------------------

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "embedding.weight"}


def _named(module: Any, *arguments: jax.ShapeDtypeStruct) -> Mapping[tuple[str, ...], tuple]:
    """{path in the Flax tree: shape} of a module, without allocating. Tracing it takes a second."""
    tree = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x), *arguments)["params"]
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}
    return types.MappingProxyType(shapes)


def _torch_leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """('conv_blocks_0', 'conv1', 'kernel') -> 'conv_blocks.0.conv1.weight' and its shape there."""
    *modules, leaf = path
    name = ".".join([re.sub(r"_(\d+)$", r".\1", m) for m in modules] + [_LEAVES.get(leaf, leaf)])
    return name, _turned(leaf, np.broadcast_to(np.float32(0), shape)).shape


def _turned(leaf: str, array: np.ndarray, back: bool = False) -> np.ndarray:
    """A Flax kernel as PyTorch keeps it (or `back`); anything else as it is."""
    if leaf != "kernel":
        return array
    if array.ndim == 4:
        return array.transpose((2, 3, 1, 0) if back else (3, 2, 0, 1))
    return array.T


def _from_torch(shapes: Mapping[tuple, tuple], state: Arrays) -> Any:
    """`shapes` as `_named` gives them; what is under 'blocks' is stacked."""
    expected = {}
    for path, shape in shapes.items():
        if path[0] == "blocks":
            name, own = _torch_leaf(path[1:], shape[1:])
            expected |= {f"blocks.{i}.{name}": own for i in range(shape[0])}
        else:
            name, own = _torch_leaf(path, shape)
            expected[name] = own
    check_shapes(state, expected)
    flat = {}
    for path, shape in shapes.items():
        if path[0] == "blocks":
            name = _torch_leaf(path[1:], shape[1:])[0]
            rows = [state[f"blocks.{i}.{name}"] for i in range(shape[0])]
            flat[path] = np.stack([_turned(path[-1], np.asarray(row), back=True) for row in rows])
        else:
            name = _torch_leaf(path, shape)[0]
            flat[path] = _turned(path[-1], np.asarray(state[name]), back=True)
    return traverse_util.unflatten_dict(flat)


def _to_torch(shapes: Mapping[tuple, tuple], params: Any) -> dict[str, np.ndarray]:
    """The inverse of `_from_torch`."""
    flat = traverse_util.flatten_dict(params)
    check_shapes(
        {"/".join(path): array for path, array in flat.items()},
        {"/".join(path): shape for path, shape in shapes.items()},
    )
    state = {}
    for path, shape in shapes.items():
        array = np.asarray(flat[path])
        if path[0] == "blocks":
            name = _torch_leaf(path[1:], shape[1:])[0]
            for i in range(shape[0]):
                state[f"blocks.{i}.{name}"] = _turned(path[-1], array[i])
        else:
            state[_torch_leaf(path, shape)[0]] = _turned(path[-1], array)
    return state


# A buffer of the official tokenizer: which codes its training used of late. Of no use here.
_CODEBOOK_USED = "quantize.codebook_used"


@functools.cache
def _vq_shapes(config: VQConfig) -> Mapping[tuple[str, ...], tuple]:
    side = config.downsample
    return _named(
        VQModel(config), jax.ShapeDtypeStruct((1, side, side, config.channels), np.float32)
    )


def vq_from_torch(config: VQConfig, state: Arrays) -> Any:
    """LlamaGen's tokenizer -> parameters of `VQModel(config)`.

    Raises:
        NamesError: names or shapes differ from `config`; all of them are listed.
    """
    own = {name: array for name, array in state.items() if name != _CODEBOOK_USED}
    return _from_torch(_vq_shapes(config), own)


def vq_to_torch(config: VQConfig, params: Any) -> dict[str, np.ndarray]:
    """The inverse of `vq_from_torch`, with the buffer that the official model also loads."""
    state = _to_torch(_vq_shapes(config), params)
    return state | {_CODEBOOK_USED: np.zeros(65536, np.float32)}


@functools.cache
def _dinov2_shapes(config: DinoConfig) -> Mapping[tuple[str, ...], tuple]:
    return _named(
        DinoV2(config), jax.ShapeDtypeStruct((1, config.patch, config.patch, 3), np.float32)
    )


def dinov2_from_torch(config: DinoConfig, state: Arrays) -> Any:
    """The official DINOv2 backbone -> parameters of `DinoV2(config)`.

    Raises:
        NamesError: names or shapes differ from `config`; all of them are listed.
    """
    return _from_torch(_dinov2_shapes(config), state)


def dinov2_to_torch(config: DinoConfig, params: Any) -> dict[str, np.ndarray]:
    """The inverse of `dinov2_from_torch`."""
    return _to_torch(_dinov2_shapes(config), params)
