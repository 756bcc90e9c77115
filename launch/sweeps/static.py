"""A static teacher: the targets are states of a finished LlamaGen, at K = 1, 3 and 9 positions.

    python -m launch.sweep --sweep=launch/sweeps/variants.py --parallel=2
    python -m launch.sweep --sweep=launch/sweeps/static.py --parallel=2

The teacher of all runs is the first command's LlamaGen of seed 0. Published, ImageNet 256, B: with a static
teacher K = 9 is best, with the EMA K = 3 (FID 5.22 after 80 epochs); the numbers of the static one are
unknown. Compare with k.py, whose teacher is the EMA.
"""

from launch.overrides import names, product, seeds
from launch.sweeps import variants
from launch.sweeps.k import OFFSETS

CONFIG = "configs/mirai_e.py"


def get_sweep(scale: str):
    (llamagen, _), *_ = names(variants.get_sweep(scale))
    teacher = {
        "foresight[0].source": "checkpoint",
        "foresight[0].checkpoint": f"runs/sweeps/variants-{scale}/{llamagen}",
    }
    ways = [{"name": f"K={k}", "foresight[0].offsets": OFFSETS[k]} for k in (1, 3, 9)]
    return product(ways, [teacher], seeds(scale))
