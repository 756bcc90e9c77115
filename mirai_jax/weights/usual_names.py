"""The usual names of a state dict whose names wrappers, training scripts or other libraries changed."""

import re
from collections.abc import Mapping

import numpy as np

# Of torch.compile, of activation checkpointing and of FSDP, anywhere in a name.
_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_COMPUTED = re.compile(r"(.*\.)?(freqs_cis|causal_mask|kv_cache\.[kv]_cache)")  # LlamaGen's buffers
_CHUNK = re.compile(r"blocks\.\d+\.(?=\d+\.)")  # of DINOv2's training: blocks.CHUNK.BLOCK
_HUGGING_FACE = (  # DINOv2 of the library transformers -> of facebookresearch/dinov2
    (r"(dinov2\.)?embeddings\.(cls_token|mask_token|register_tokens)", r"\2"),
    (r"(dinov2\.)?embeddings\.position_embeddings", "pos_embed"),
    (r"(dinov2\.)?embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"(dinov2\.)?encoder\.layer\.", "blocks."),
    (r"(dinov2\.)?layernorm\.", "norm."),
    (r"attention\.output\.dense", "attn.proj"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"mlp\.weights_in", "mlp.w12"),
    (r"mlp\.weights_out", "mlp.w3"),
)


def usual(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict under the names of the official code, without what that code computes."""
    state = {_WRAPPERS.sub("", name): array for name, array in state.items()}
    while state and all(name.startswith("module.") for name in state):  # DistributedDataParallel
        state = {name.removeprefix("module."): array for name, array in state.items()}
    if "backbone.cls_token" in state:  # DINOv2's training: beside the network it has heads
        own = [name for name in state if name.startswith("backbone.")]
        state = {name.removeprefix("backbone."): state[name] for name in own}
    if any(name.endswith("embeddings.cls_token") for name in state):
        state = _from_hugging_face(state)
    state = {_CHUNK.sub("blocks.", n): a for n, a in state.items() if not _COMPUTED.fullmatch(n)}
    if {"cls_token", "pos_embed"} <= state.keys():  # only pretraining uses the mask token
        width = state["cls_token"].shape[-1]
        state.setdefault("mask_token", np.zeros((1, width), state["cls_token"].dtype))
    return state


def _from_hugging_face(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Joins queries, keys and values, which transformers keeps apart."""
    joined: dict[str, np.ndarray] = {}
    for theirs, array in state.items():
        name = theirs
        for pattern, ours in _HUGGING_FACE:
            name = re.sub(pattern, ours, name)
        if ".attention.attention." not in name:
            joined[name] = array
        elif ".query." in name:
            parts = [
                state[theirs.replace(".query.", part)] for part in (".query.", ".key.", ".value.")
            ]
            joined[name.replace("attention.attention.query", "attn.qkv")] = np.concatenate(parts)
    return joined
