"""Which block is aligned: the same one of student and teacher, over the depth of the model.

    python -m launch.sweep --sweep=launch/sweeps/layer.py --parallel=2

Published, ImageNet 256, B (12 blocks): block 8 is best. The sweep has at most six blocks, evenly spaced,
with the last one.
"""

from configs import base
from launch.overrides import over, product, seeds, zipped
from mirai_jax.models.generator import SIZES

CONFIG = "configs/mirai_e.py"


def depth(scale: str) -> int:
    """Blocks of the scale's generator."""
    model = base.get_config(scale).model
    return model.num_layers or SIZES[model.size][0]


def get_sweep(scale: str):
    blocks = depth(scale)
    step = -(-blocks // 6)
    layers = range(blocks, 0, -step)[::-1]
    both = (over(f"foresight[0].{whose}_layer", layers) for whose in ("student", "teacher"))
    return product(zipped(*both), seeds(scale))
