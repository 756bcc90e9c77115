"""LlamaGen, the baseline: next-token likelihood alone.

python -m mirai_jax.main --config=configs/llamagen.py[:scale]
"""

from configs import base


def get_config(scale: str = ""):
    config = base.get_config(scale)
    config.name = "llamagen"
    return config
