"""The published vision transformers, and the config that a state dict was made for."""

import math
from collections.abc import Mapping
from typing import Any

from mirai_jax.models.vit import VitConfig

_HEAD_DIM = 64  # in every published size
_SHAPES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24)}
_DINOV3 = {"patch": 16, "pos_grid": None, "epsilon": 1e-5, "masked_k_bias": True}
_MAE = {"patch": 16, "pos_grid": (14, 14), "layer_scale": False, "mask_token": False}

# By the name of the checkpoint. MAE has published no small one, but others have.
PUBLISHED: Mapping[str, VitConfig] = {
    **{
        f"dinov2_vit{size}14{suffix}": VitConfig(*shape, registers=registers, swiglu=size == "g")
        for suffix, registers in (("", 0), ("_reg4", 4))
        for size, shape in _SHAPES.items()
    },
    **{f"dinov3_vit{size}16": VitConfig(*_SHAPES[size], registers=4, **_DINOV3) for size in "sbl"},
    **{f"mae_vit{size}16": VitConfig(*_SHAPES[size], **_MAE) for size in "sbl"},
}


def config_of(state: Mapping[str, Any], num_heads: int | None = None) -> VitConfig:
    """The config that a PyTorch state dict was made for.

    Args:
        state: arrays (anything with a `shape`) under their official names. Only what the config
            needs is read: the mapping of names checks the rest.
        num_heads: of attention; None: as the periods of DINOv3's rotations show, else the published
            width of 64 (no shape of the others determines it).

    Raises:
        ValueError: not the state dict of a vision transformer.
    """
    no = "not the state dict of a vision transformer"

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"{no}: it has no {name}")
        found = tuple(state[name].shape)
        if len(found) != rank or 0 in found:
            raise ValueError(f"{no}: {name} is {found}, not of {rank} axes")
        return found

    width, rotary = shape("cls_token", 3)[-1], "rope_embed.periods" in state
    side = 0
    if not rotary:
        patches = shape("pos_embed", 3)[1] - 1
        side = math.isqrt(patches)
        if side == 0 or side**2 != patches:
            raise ValueError(f"{no}: pos_embed has {patches} patches, not a square")
    layers = sum(n.startswith("blocks.") and n.endswith(".norm1.weight") for n in state)
    if layers == 0:
        raise ValueError(f"{no}: it has no blocks.0.norm1.weight")
    if num_heads is None:
        head_dim = 4 * shape("rope_embed.periods", 1)[0] if rotary else _HEAD_DIM
        if width % head_dim:
            raise ValueError(
                f"cls_token is {width} wide, no multiple of {head_dim}: give num_heads"
            )
        num_heads = width // head_dim
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads is {num_heads}, must divide the width of {width}")
    registers = "storage_tokens" if rotary else "register_tokens"
    return VitConfig(
        width=width,
        num_layers=layers,
        num_heads=num_heads,
        registers=shape(registers, 3)[1] if registers in state else 0,
        swiglu="blocks.0.mlp.w12.weight" in state,
        pos_grid=None if rotary else (side, side),
        patch=shape("patch_embed.proj.weight", 4)[-1],
        epsilon=1e-5 if rotary else 1e-6,
        layer_scale="blocks.0.ls1.gamma" in state,
        masked_k_bias="blocks.0.attn.qkv.bias_mask" in state,
        mask_token="mask_token" in state,
        local_cls_norm="local_cls_norm.weight" in state,
    )
