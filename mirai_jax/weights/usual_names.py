"""The usual names of a state dict whose names wrappers, training scripts or other libraries changed."""

import re
from collections.abc import Mapping

import numpy as np

# Of torch.compile, of activation checkpointing and of FSDP, anywhere in a name.
_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_COMPUTED = re.compile(r"(.*\.)?(freqs_cis|causal_mask|kv_cache\.[kv]_cache)")  # LlamaGen's buffers
_CHUNK = re.compile(r"blocks\.\d+\.(?=\d+\.)")  # of DINOv2's training: blocks.CHUNK.BLOCK
# The library transformers, for DINOv2, DINOv3 and MAE -> the official code, one after the other.
_HUGGING_FACE = (
    (r"^embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^(encoder\.|model\.)?layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.(mlp\.up_proj|intermediate\.dense)\.", ".mlp.fc1."),
    (r"\.(mlp\.down_proj|output\.dense)\.", ".mlp.fc2."),
)
_QUERY = re.compile(r"\.attention\.(attention\.query|q_proj)\.")


def usual(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict under the names of the official code, without what that code computes."""
    state = {_WRAPPERS.sub("", name): array for name, array in state.items()}
    while state and all(name.startswith("module.") for name in state):  # DistributedDataParallel
        state = {name.removeprefix("module."): array for name, array in state.items()}
    if "backbone.cls_token" in state:  # DINOv2's training: beside the network it has heads
        own = [name for name in state if name.startswith("backbone.")]
        state = {name.removeprefix("backbone."): state[name] for name in own}
    for name in [name for name in state if name.endswith("embeddings.cls_token")]:
        state = _from_hugging_face(state, name.removesuffix("embeddings.cls_token"))
    state = {_CHUNK.sub("blocks.", n): a for n, a in state.items() if not _COMPUTED.fullmatch(n)}
    if "pos_embed" in state and any(name.startswith("decoder") for name in state):  # MAE's training
        unused = ("decoder", "mask_token")
        state = {name: a for name, a in state.items() if not name.startswith(unused)}
    if "cls_token" in state and any(name.endswith(".ls1.gamma") for name in state):
        width = state["cls_token"].shape[-1]  # only pretraining uses the mask token
        state.setdefault("mask_token", np.zeros((1, width), state["cls_token"].dtype))
    return state


def _from_hugging_face(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    state = {name.removeprefix(prefix): array for name, array in state.items()}
    dinov3 = "embeddings.patch_embeddings.weight" in state
    joined, found = dict(state), {}
    for q in filter(_QUERY.search, state):  # transformers keeps queries, keys and values apart
        k, v = (q.replace("query", n).replace("q_proj", f"{n[0]}_proj") for n in ("key", "value"))
        if dinov3 and q.endswith(".bias"):  # of keys it has none
            joined.setdefault(k, np.zeros_like(state[q]))
        if {k, v} <= joined.keys():
            joined[_QUERY.sub(".attn.qkv.", q)] = np.concatenate([joined.pop(n) for n in (q, k, v)])
    for name, array in joined.items():
        for pattern, ours in _HUGGING_FACE:
            name = re.sub(pattern, ours, name)
        found[name] = array
    return _dinov3(found) if dinov3 else found


def _dinov3(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With what the official code stores and transformers computes; heads are 64 wide."""
    names = {"register_tokens": "storage_tokens"}
    state = {names.get(name, name): array for name, array in state.items()}
    if "mask_token" in state:
        state["mask_token"] = state["mask_token"].reshape(1, -1)
    state["rope_embed.periods"] = np.float32(100) ** (np.arange(16, dtype=np.float32) / 16)
    for name in [name for name in state if name.endswith(".attn.qkv.bias")]:
        mask = np.ones_like(state[name]).reshape(3, -1)
        mask[1] = 0
        state[f"{name}_mask"] = mask.reshape(-1)
    return state
