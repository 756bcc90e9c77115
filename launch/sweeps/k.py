"""How many future positions: K = 1 (the same position), 3 and 9 (a 3x3 block to the lower right).

    python -m launch.sweep --sweep=launch/sweeps/k.py --parallel=2

Published with K = 3 (FID 5.22, ImageNet 256, B, 80 epochs). Every head has the weight 2 and the loss sums
the heads, so that more heads weigh more.
"""

from launch.overrides import product, seeds

CONFIG = "configs/mirai_e.py"

OFFSETS = {
    1: ((0, 0),),
    3: ((0, 0), (0, 1), (1, 0)),
    9: tuple((row, column) for row in range(3) for column in range(3)),
}


def get_sweep(scale: str):
    ways = [{"name": f"K={k}", "foresight[0].offsets": offsets} for k, offsets in OFFSETS.items()]
    return product(ways, seeds(scale))
