"""What is aligned, and along what: the paper's four cells.

    python -m launch.sweep --sweep=launch/sweeps/level.py --parallel=2

Published, ImageNet 256, B, 80 epochs, K = 3, FID: output 1-D 7.28, output 2-D 6.48, internal 1-D
6.20, internal 2-D 5.22, against LlamaGen's 6.36: predicting tokens is worse than no foresight at
all, aligning states on the grid is best.
"""

from launch.overrides import over, product, seeds, zipped

CONFIG = "configs/mirai_e.py"


def get_sweep(scale: str):
    layouts = zipped(
        over("foresight[0].layout", ["1d", "2d"]),
        over("foresight[0].offsets", [(0, 1, 2), ((0, 0), (0, 1), (1, 0))]),
    )
    return product(over("foresight[0].level", ["output", "internal"]), layouts, seeds(scale))
