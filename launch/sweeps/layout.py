"""Which positions are targets: along the raster or on the grid, and what happens at its borders.

    python -m launch.sweep --sweep=launch/sweeps/layout.py --parallel=2

Published, ImageNet 256, B, 80 epochs, K = 3, FID: 1-D 6.20, 2-D 5.22. The official code shifts the
flattened sequence, so that pairs which leave the grid wrap to its other side (`borders` wrap);
`mask` drops them, which is not in the paper.
"""

from launch.overrides import chain, over, product, seeds

CONFIG = "configs/mirai_e.py"


def get_sweep(scale: str):
    raster = [{"foresight[0].layout": "1d", "foresight[0].offsets": (0, 1, 2)}]
    grid = product(
        over("foresight[0].layout", ["2d"]), over("foresight[0].borders", ["wrap", "mask"])
    )
    return product(chain(raster, grid), seeds(scale))
