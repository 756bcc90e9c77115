"""Mirai-E: the targets are states of the model's own EMA at future grid positions.

    python -m mirai_jax.main --config=configs/mirai_e.py[:scale]

At imagenet scales this is the published run: three offsets of weight 2, from epoch 15 on, halved
from epoch 80 on.
"""

from configs import base


def get_config(scale: str = ""):
    config = base.get_config(scale)
    config.name = "mirai_e"
    config.foresight = (base.term(config, source="ema"),)
    return config
