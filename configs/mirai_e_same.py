"""A control for Mirai-E: three heads at the same position, so that the EMA's targets know nothing of the future.

    python -m mirai_jax.main --config=configs/mirai_e_same.py[:scale]

Each head is a term, since the offsets of one term must differ.
"""

from configs import base


def get_config(scale: str = ""):
    config = base.get_config(scale)
    config.name = "mirai_e_same"
    config.foresight = tuple(base.term(config, source="ema", offsets=((0, 0),)) for _ in range(3))
    return config
