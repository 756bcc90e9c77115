"""Mirai-E and Mirai-I together: two foresight terms in one run.

python -m mirai_jax.main --config=configs/mirai_e_i.py[:scale]
"""

from configs import base


def get_config(scale: str = ""):
    config = base.get_config(scale)
    config.name = "mirai_e_i"
    config.foresight = (
        base.term(config, source="ema"),
        base.term(config, source="bidirectional", offsets=((0, 0),), start_epoch=0.0, schedule=()),
    )
    return config
