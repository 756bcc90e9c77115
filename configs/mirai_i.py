"""Mirai-I: the targets are features of a frozen bidirectional encoder at the same grid position.

    python -m mirai_jax.main --config=configs/mirai_i.py[:scale]

One head of weight 2 from the first step on, constant, as published. At imagenet scales this is the
published run; it needs the shards of codes, the images that they were made of, and DINOv2's weights:

    --config.data.path=SHARDS --config.data.images=IMAGENET/train
    --config.teacher.path=dinov2_vitb14_pretrain.pth --config.tokenizer.path=vq_ds16_c2i.pt
"""

from configs import base


def get_config(scale: str = ""):
    config = base.get_config(scale)
    config.name = "mirai_i"
    config.foresight = (
        base.term(config, source="bidirectional", offsets=((0, 0),), start_epoch=0.0, schedule=()),
    )
    return config
