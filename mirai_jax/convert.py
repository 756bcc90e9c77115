"""PyTorch parameter names and layouts <-> Flax trees, strict in both directions.

PyTorch keeps Linear weights as [out, in]; here kernels are [in, out], attention kernels carry heads
as axes of their own, and blocks and projectors are stacked on a leading axis.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mirai_jax.models.generator import GeneratorConfig

Arrays = Mapping[str, np.ndarray]


def _generator_shapes(config: GeneratorConfig) -> dict[str, tuple[int, ...]]:
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


def check_shapes(state: Arrays, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError listing every missing, unexpected or misshapen name."""
    problems = [f"missing {name} {expected[name]}" for name in sorted(expected.keys() - state)]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - expected.keys())]
    problems += [
        f"{name} is {tuple(state[name].shape)}, should be {expected[name]}"
        for name in sorted(expected.keys() & state.keys())
        if tuple(state[name].shape) != expected[name]
    ]
    if problems:
        raise ValueError("parameters do not fit: " + "; ".join(problems))


def generator_from_torch(config: GeneratorConfig, state: Arrays) -> Any:
    """LlamaGen's state dict (no projectors) -> parameters of `Generator(config)`.

    Raises:
        ValueError: names or shapes differ from `config`; all of them are listed.
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
        ValueError: a projector is incomplete, or fewer than `num_heads` are there.
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
        raise ValueError("parameters do not fit: missing " + "; ".join(missing or ["projectors"]))
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
