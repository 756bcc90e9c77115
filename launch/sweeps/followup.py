"""Two ideas of the authors' follow-up (Video-Mirai), on Mirai-I: look-ahead windows, a projector that is a
transformer.

    python -m launch.sweep --sweep=launch/sweeps/followup.py --parallel=2

A window's target is the mean of the encoder's features over the next positions (a quarter of a row, a whole
row) or over rows downwards. The transformer is causal. No image results of these are published: compare
with `plain`, which is Mirai-I (ImageNet 256, B, 80 epochs: FID 4.77).
"""

from configs import base
from launch.overrides import product, seeds

CONFIG = "configs/mirai_i.py"


def get_sweep(scale: str):
    _, columns = base.get_config(scale).model.grid
    window, along = "foresight[0].window", "foresight[0].window_along"
    transformer = {"foresight[0].projector": "transformer"}
    ways = [
        {"name": "plain"},
        {"name": f"positions-{columns // 4}", window: columns // 4},
        {"name": f"positions-{columns}", window: columns},
        {"name": "rows-2", window: 2, along: "rows"},
        {"name": "rows-4", window: 4, along: "rows"},
        {"name": "transformer", **transformer},
        {"name": f"transformer-positions-{columns}", window: columns, **transformer},
    ]
    return product(ways, seeds(scale))
