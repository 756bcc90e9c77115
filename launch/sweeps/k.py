"""How many future positions, on the grid and along the raster: K = 1, 3, 4 and 9.

    python -m launch.sweep --sweep=launch/sweeps/k.py --parallel=2

On the grid, K = 1 is the same position, 4 and 9 are squares to the lower right. Along the raster they are
the next positions; there K = 1 would be the same run. Published, ImageNet 256, B, 80 epochs, K = 3, FID:
on the grid 5.22, along the raster 6.20. Of the other K only the order is known: 3 is best with the EMA as
teacher, 9 with a static generator (static.py), 1 with an encoder. Every head has the weight 2 and the loss
sums the heads, so that more heads weigh more.
"""

from launch.overrides import chain, product, seeds

CONFIG = "configs/mirai_e.py"

OFFSETS = {
    1: ((0, 0),),
    3: ((0, 0), (0, 1), (1, 0)),
    4: ((0, 0), (0, 1), (1, 0), (1, 1)),
    9: tuple((row, column) for row in range(3) for column in range(3)),
}


def get_sweep(scale: str):
    grid = [{"name": f"K={k}", "foresight[0].offsets": offsets} for k, offsets in OFFSETS.items()]
    raster = [
        {
            "name": f"K={k}-1d",
            "foresight[0].layout": "1d",
            "foresight[0].offsets": tuple(range(k)),
        }
        for k in OFFSETS
        if k > 1
    ]
    return product(chain(grid, raster), seeds(scale))
