"""The weight over time: 2 and from mid-training on 1, constant 1, constant 2.

    python -m launch.sweep --sweep=launch/sweeps/schedule.py --parallel=2

Published, ImageNet 256, B: 2 -> 1 at mid-training (epoch 40 of 80, 150 of 300) is the best of the schedules
tried; single numbers are unknown. The official code halves the weight at epoch 80, which a run of 80
epochs never reaches: the published 5.22 (FID, 80 epochs) is then constant 2, if it was made with that code.
"""

from launch.overrides import product, seeds

CONFIG = "configs/mirai_e.py"


def get_sweep(scale: str):
    halved = {"foresight[0].schedule": ((0.5, 0.5),), "foresight[0].schedule_unit": "shares"}
    ways = [
        {"name": "2-to-1", "foresight[0].weights": (2.0,), **halved},
        {"name": "1", "foresight[0].weights": (1.0,), "foresight[0].schedule": ()},
        {"name": "2", "foresight[0].weights": (2.0,), "foresight[0].schedule": ()},
    ]
    return product(ways, seeds(scale))
