"""How strong foresight is, and from which epoch on.

    python -m launch.sweep --sweep=launch/sweeps/weight.py --parallel=2

Published: weight 2 from epoch 15 of 80 on. First the weights at the config's own start, then other
starts at the config's own weight.
"""

from launch.overrides import chain, over, product, seeds

CONFIG = "configs/mirai_e.py"


def get_sweep(scale: str):
    starts = [0.0, 5.0, 30.0] if scale.startswith("imagenet") else [0.0, 3.0, 6.0]
    ways = chain(
        over("foresight[0].weights", [(0.5,), (1.0,), (2.0,), (4.0,)]),
        over("foresight[0].start_epoch", starts),
    )
    return product(ways, seeds(scale))
