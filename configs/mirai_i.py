"""Mirai-I: the targets are features of a frozen bidirectional encoder at the same grid position.

    python -m mirai_jax.main --config=configs/mirai_i.py[:scale]

One head of weight 2 from the first step on, constant, as published. The imagenet scales need DINOv2,
which is not in this version.
"""

from configs import base


def get_config(scale: str = ""):
    config = base.get_config(scale)
    config.name = "mirai_i"
    config.foresight = (
        base.term(config, source="bidirectional", offsets=((0, 0),), start_epoch=0.0, schedule=()),
    )
    return config
