"""When foresight begins: with the first step, or after 15 epochs, for Mirai-E and Mirai-I.

    python -m launch.sweep --sweep=launch/sweeps/start.py --parallel=2

Published, ImageNet 256, B, 80 epochs, FID: Mirai-E starts at epoch 15 (5.22), Mirai-I at once (4.77); the other
two cells are unknown. Small scales start where base.py has it, as early in their run.
"""

from configs import base
from launch.overrides import over, product, seeds


def get_sweep(scale: str):
    late = base.term(base.get_config(scale)).start_epoch
    return product(
        over("config", ["configs/mirai_e.py", "configs/mirai_i.py"]),
        over("foresight[0].start_epoch", [0.0, late]),
        seeds(scale),
    )
