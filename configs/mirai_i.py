"""Mirai-I: the targets are features of a frozen bidirectional encoder at the same grid position.

    python -m mirai_jax.main --config=configs/mirai_i.py[:scale]

One head of weight 2 from the first step on, constant, as published.
"""

from configs import base


def get_config(scale: str = ""):
    config = base.get_config(scale)
    config.name = "mirai_i"
    config.foresight = (base.term(config, source="bidirectional", offsets=((0, 0),)),)
    return config
